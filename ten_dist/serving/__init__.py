"""A model behind HTTP: the interface of OpenAI's completions, and a page to try it."""
