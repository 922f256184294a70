"""From a corpus to token shards: text -> tokenizer -> webdataset tars and a manifest."""
