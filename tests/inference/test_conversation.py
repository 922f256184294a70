"""Conversations as states: what a turn reads, where answers end, and what files keep."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import models

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.data.chat_template import ChatTemplate
from ten_dist.data.tokenizer import TextTokenizer, byte_level, byte_tokenizer
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.generation import Decoder, Sampling
from ten_dist.inference.conversation import Conversation
from ten_dist.inference.conversation_file import load_conversation, save_conversation
from ten_dist.inference.turn_tokens import TurnTokens
from ten_dist.model.state import named_leaves, state_bytes

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IN_WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} .end.\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BYTES = TextTokenizer(byte_tokenizer().to_str())


def special_tokenizer():
    """Tokens of bytes, and the special ones of ChatML."""
    plain = json.loads(byte_tokenizer().to_str())["model"]
    tokenizer = byte_level(models.BPE(vocab=plain["vocab"], merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    return TextTokenizer(tokenizer.to_str())


TEMPLATES = {
    "default": (ChatTemplate.default(), BYTES),
    "chatml": (ChatTemplate(CHATML), special_tokenizer()),
    "words": (ChatTemplate(IN_WORDS), BYTES),
}


class Recorder(Decoder):
    """A decoder that knows what its model has read in each call."""

    def __init__(self, network):
        super().__init__(network)
        self.network, self.read = network, []
        network.embedding.register_forward_hook(
            lambda module, arguments, output: self.read.extend(
                arguments[0].flatten().tolist()
            )
        )


@pytest.fixture
def script(monkeypatch):
    """A list of tokens that the model says, whatever it would say by itself."""
    tokens = []

    def draw(logits, samplers):
        return [tokens.pop(0) for _ in samplers]

    monkeypatch.setattr("ten_dist.generation.decoder.draw", draw)
    return tokens


def make_conversation(name="default", steps=12, system=None, seed=0):
    template, tokenizer = TEMPLATES[name]
    torch.manual_seed(0)
    config = TemporalEigenstateConfig(
        vocab_size=259, dim=32, n_layers=2, num_eigenstates=24, hten_scales=(1, 2, 4)
    )
    decoder = Recorder(TemporalEigenstateNetwork(config).eval())
    turns = TurnTokens(template, tokenizer, system)
    sampling = Sampling(temperature=2.0, seed=seed)
    return Conversation(decoder, turns, tokenizer, sampling, steps), decoder


def say(conversation, said, **options):
    return "".join(conversation.answer(said, **options))


def state_of(decoder, ids):
    """The state of a model that has read these tokens at once."""
    with torch.no_grad():
        return decoder.network(torch.tensor([ids]), return_state=True)[1]


@pytest.mark.parametrize("system", [None, "be kind"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_read_their_own_tokens_and_leave_the_state_of_the_whole(
    script, name, system
):
    template, tokenizer = TEMPLATES[name]
    conversation, decoder = make_conversation(name, system=system)
    end = template.turn_end(tokenizer).tolist()
    messages = [] if system is None else [{"role": "system", "content": system}]
    read = []
    # One answer has its end, one is ended by the separator, and one is too long.
    for answer, behind in [
        ("yes", end),
        ("no", [tokenizer.separator_id]),
        ("a long answer", []),
        ("so", end),
    ]:
        script[:] = [*tokenizer.encode([answer])[0].tolist(), *behind]
        decoder.read.clear()
        said = f"what is {len(messages)}?"
        messages.append({"role": "user", "content": said})
        wanted = template.encode(messages, tokenizer, True)[0].tolist()
        answered = say(conversation, said)
        assert answered == answer[:12]
        messages.append({"role": "assistant", "content": answered})
        read += decoder.read
        # Nothing was read again, and everything was as the template writes the whole.
        assert read[: len(wanted)] == wanted
        assert len(decoder.read) < 80
    whole = template.encode(messages, tokenizer)[0].tolist()
    assert [*read, *conversation.state.unread] == whole[: len(read) + 1]
    assert conversation.state.tokens == len(read) + 1
    pairs = zip(
        named_leaves(conversation.state.network),
        named_leaves(state_of(decoder, read)),
        strict=True,
    )
    for (place, found), (_, expected) in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=place)


def test_an_answer_that_is_stopped_is_ended_by_the_next_turn(script):
    conversation, decoder = make_conversation()
    script[:] = list(b"never ending")
    asked = iter([False] * 5 + [True])
    assert say(conversation, "talk", stopped=lambda: next(asked)) == "never"
    assert conversation.finish_reason == "cancelled"
    script[:] = [*b"ok", 3]
    assert say(conversation, "go on") == "ok"
    text = bytes(decoder.read).decode()
    assert text.endswith("never\x03\x02user\ngo on\x03\x02assistant\nok")


def test_what_was_stopped_before_it_was_read_was_not_said(script):
    conversation, _ = make_conversation()
    script[:] = [*b"ok", 3]
    say(conversation, "hello")
    before = conversation.state
    assert say(conversation, "and", stopped=lambda: True) == ""
    assert conversation.state is before


def test_a_conversation_is_as_large_after_any_length(tmp_path):
    sizes = set()
    for number, length in enumerate((10, 10_000)):
        conversation, _ = make_conversation()
        say(conversation, "x" * length)
        assert conversation.state.tokens > length
        path = tmp_path / f"{number}"
        save_conversation(path, conversation.state, "model")
        sizes.add((state_bytes(conversation.state.network), path.stat().st_size // 64))
    assert len(sizes) == 1


def test_a_saved_conversation_goes_on_as_if_it_had_not_been(tmp_path):
    conversation, _ = make_conversation()
    say(conversation, "hello")
    path = tmp_path / "saved"
    size = save_conversation(path, conversation.state, "model")
    assert size == path.stat().st_size
    wanted = [say(conversation, said) for said in ("and then?", "and now?")]
    other, _ = make_conversation()
    other.state = load_conversation(path, "model", other.empty_state())
    assert [say(other, said) for said in ("and then?", "and now?")] == wanted
    assert say(other, "and then?") != wanted[0]


def test_files_of_others_are_refused(tmp_path):
    conversation, _ = make_conversation()
    path, like = tmp_path / "saved", conversation.empty_state()
    with pytest.raises(ConfigurationError, match="nothing has been said"):
        save_conversation(path, conversation.state, "model")
    say(conversation, "hello")
    save_conversation(path, conversation.state, "model")
    content = path.read_bytes()
    with pytest.raises(DataError, match=f"{path} is of a conversation with another"):
        load_conversation(path, "other", like)
    for at in range(8, len(content), 97):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DataError, match=f"{path} is"):
            load_conversation(path, "model", like)
    for other in (b"", b"text", content[:-1], content[:100], content + b"x"):
        path.write_bytes(other)
        with pytest.raises(DataError, match=f"{path} is no file of a conversation"):
            load_conversation(path, "model", like)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="is no file of a conversation"):
        load_conversation(path, "model", like)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_conversation(tmp_path / "missing", "model", like)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # How many messages there are, before the first one.
        ("{{ messages | length }}" + IN_WORDS, "does not begin with"),
        # How many there were, in each turn.
        (IN_WORDS.replace("{{ m.role }}", "{{ loop.index }}", 1), "does not begin"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nobody could tell"),
        ("{% for m in messages[:1] %}{{ raise_exception('no') }}{% endfor %}", "no"),
    ],
)
def test_templates_that_do_not_go_turn_by_turn_are_refused(source, message):
    with pytest.raises(ConfigurationError, match=message):
        TurnTokens(ChatTemplate(source), BYTES)
