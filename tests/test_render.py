import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gift_lightning.records import Record, Rejected
from gift_lightning.render import Encoded, Rendering, encode_all

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The mark of the end of the turn lies outside of what this template calls generated.
MARKED_SHORT = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' and loop.index0 % 2 == 0 %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' and loop.index0 % 2 == 1 %}"
    "{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Roles must alternate user and assistant') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen3: thinking of earlier turns is dropped, and the last turn gets an empty block without it.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{% set t = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m['content'] else '' %}"
    "{{ '<think>\n' + t + '\n</think>\n\n' + c }}{% else %}{{ c }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = {
    CHATML: (None, "<|im_end|>", ["<|im_start|>"]),
    MARKED: (None, "<|im_end|>", ["<|im_start|>"]),
    MARKED_SHORT: (None, "<|im_end|>", ["<|im_start|>"]),
    QWEN3: (None, "<|im_end|>", ["<|im_start|>"]),
    LLAMA3: ("<s>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    MISTRAL: ("<s>", "</s>", ["[INST]", "[/INST]"]),
    GEMMA: ("<s>", "</s>", ["<start_of_turn>", "<end_of_turn>"]),
    PLAIN: ("<s>", "</s>", []),
    None: ("<s>", "</s>", []),
}
NAMES = {"chatml": CHATML, "marked": MARKED, "marked_short": MARKED_SHORT, "llama3": LLAMA3}
NAMES |= {"mistral": MISTRAL, "gemma": GEMMA, "plain": PLAIN}
ENDS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "marked_short": "<|im_end|>"}
ENDS |= {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>", "plain": "</s>"}


def encode(record, *how, **options):
    """One record of `encode_all`."""
    return next(encode_all([record], *how, **options))[1]


def byte_tokenizer(template=None, add_bos=True, pad=None, merges=(), add_eos=False):
    """One token per byte, special tokens, and the given merges."""
    bos, eos, others = SPECIALS[template]
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    # No regular expression: merges may then cross spaces.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = [token for token in [bos, eos, pad, *others] if token]
    backend.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(names)])
    if bos and add_bos:
        ids = [(token, backend.token_to_id(token)) for token in (bos, eos)]
        single = f"{bos} $A" + (f" {eos}" if add_eos else "")
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad or eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def chat(*contents, system=None, **options):
    messages = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return Record("test:1", completion=messages, **options)


def learned(tokenizer, result):
    """The text of each run of learned tokens."""
    assert isinstance(result, Encoded), result
    assert len(result.input_ids) == len(result.labels)
    assert result.labels[0] == -100
    runs, previous = [], False
    for token, label in zip(result.input_ids, result.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            runs = [*runs, [token]] if not previous else [*runs[:-1], [*runs[-1], token]]
        previous = label != -100
    return [tokenizer.decode(run) for run in runs]


# --- plain text -----------------------------------------------------------------------------


def test_prompt_and_completion_by_hand():
    tokenizer = byte_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
    result = encode(Record("x:1", "bc", "a"), tokenizer, Rendering())
    assert result == Encoded([bos, a, b, c, eos], [-100, -100, b, c, eos])
    result = encode(Record("x:1", "abc"), tokenizer, Rendering())
    assert result == Encoded([bos, a, b, c, eos], [-100, a, b, c, eos])
    result = encode(Record("x:1", "bc", "a"), tokenizer, Rendering(loss_on="all"))
    assert result == Encoded([bos, a, b, c, eos], [-100, a, b, c, eos])


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = byte_tokenizer(add_bos=False)
    a, b = tokenizer("ab")["input_ids"]
    result = encode(Record("x:1", "ab"), tokenizer, Rendering())
    assert result == Encoded([a, b, tokenizer.eos_token_id], [-100, b, tokenizer.eos_token_id])


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("prompt", [None, "q ", "<s>q "])
@pytest.mark.parametrize("completion", ["answer", "answer</s>"])
def test_bos_and_eos_exactly_once(add_eos, prompt, completion):
    tokenizer = byte_tokenizer(add_eos=add_eos)
    result = encode(Record("x:1", completion, prompt), tokenizer, Rendering())
    assert result.input_ids.count(tokenizer.bos_token_id) == 1
    assert result.input_ids.count(tokenizer.eos_token_id) == 1
    assert result.input_ids[0] == tokenizer.bos_token_id
    assert result.labels[-1] == tokenizer.eos_token_id
    assert learned(tokenizer, result) == ["answer</s>"]


def test_pad_equal_to_eos_is_still_learned():
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    result = encode(Record("x:1", "b", "a"), tokenizer, Rendering())
    assert result.labels[-1] == tokenizer.pad_token_id


def test_a_token_across_the_boundary_is_learned():
    tokenizer = byte_tokenizer(merges=[("b", "c")])
    result = encode(Record("x:1", "cd", "ab"), tokenizer, Rendering())
    assert learned(tokenizer, result) == ["bcd</s>"]
    assert result.notes == ("the first learned token holds the end of the prompt",)
    result = encode(Record("x:1", "d", "abc"), tokenizer, Rendering())
    assert learned(tokenizer, result) == ["d</s>"] and result.notes == ()


def test_prompt_format():
    tokenizer = byte_tokenizer()
    rendering = Rendering(prompt_format="Q: {prompt} {x} A:")
    result = encode(Record("x:1", " 4", "2+2?"), tokenizer, rendering)
    assert tokenizer.decode(result.input_ids) == "<s>Q: 2+2? {x} A: 4</s>"
    assert learned(tokenizer, result) == [" 4</s>"]
    with pytest.raises(ValueError, match="prompt_format 'Q' must contain"):
        Rendering(prompt_format="Q")


def test_unicode_decodes_exactly():
    tokenizer = byte_tokenizer()
    answer = "π ≈ 3.14 🙂 naïve\tλ\n"
    result = encode(Record("x:1", answer, "é🙂"), tokenizer, Rendering())
    assert learned(tokenizer, result) == [answer + "</s>"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record("x:1", " \n", "a"), "blank completion"),
        (Record("x:1", "a", " "), "blank prompt"),
        (Record("x:1", "a\0b", "a"), "NUL character in the text"),
        (Record("x:1", "a\ud800", "a"), "lone surrogate or undecodable byte in the text"),
        (Record("x:1", input_ids=[1, 2], labels=[-100, -100]), "no token to learn"),
        (Record("x:1", input_ids=[1, 2], labels=[1, -100]), "no token to learn"),
        (Record("x:1", input_ids=[], labels=[]), "no token to learn"),
        (Record("x:1", input_ids=[1, 300]), "token id outside the vocabulary"),
        (Record("x:1", input_ids=[1, -1]), "token id outside the vocabulary"),
    ],
)
def test_rejections(record, reason):
    result = encode(record, byte_tokenizer(), Rendering(), vocab_size=258)
    assert isinstance(result, Rejected)
    assert (result.kind, result.origin) == (reason, "x:1")


def test_prepared_tokens_are_left_alone():
    tokenizer = byte_tokenizer()
    record = Record("x:1", input_ids=[5, 6, 7, 8], labels=[-100, 6, -100, 8])
    result = encode(record, tokenizer, Rendering())
    assert result == Encoded([5, 6, 7, 8], [-100, 6, -100, 8])


def test_ids_above_the_embedding_are_rejected_by_the_tokenizer_too():
    tokenizer = byte_tokenizer()
    assert encode(Record("x:1", "a"), tokenizer, Rendering(), len(tokenizer)).labels
    result = encode(Record("x:1", "a"), tokenizer, Rendering(), len(tokenizer) - 1)
    assert result.reason == "token id outside the vocabulary: 257, not in 0..256"


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token; set its eos_token"):
        encode(Record("x:1", "a"), tokenizer, Rendering())


# --- truncation -----------------------------------------------------------------------------


def test_truncation():
    tokenizer = byte_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c, d, e = tokenizer("abcde", add_special_tokens=False)["input_ids"]
    record = Record("x:7", "cde", "ab")  # with BOS and EOS 7 tokens

    def cut(how, most):
        return encode(record, tokenizer, Rendering(max_length=most, truncation=how))

    assert cut("drop", 7).input_ids == [bos, a, b, c, d, e, eos]
    assert cut("drop", None).input_ids == [bos, a, b, c, d, e, eos]
    assert cut("drop", 6) == Rejected("longer than max_length 6: 7 tokens", "x:7")
    assert cut("drop", 3) == Rejected("prompt longer than max_length 3: 7 tokens", "x:7")
    assert cut("keep_start", 5).input_ids == [bos, a, b, c, d]
    assert cut("keep_start", 5).labels == [-100, -100, -100, c, d]
    assert cut("keep_start", 5).notes == ("cut to max_length 5 (keep_start)",)
    assert cut("keep_start", 3).reason == "prompt longer than max_length 3: 7 tokens"
    assert cut("keep_end", 5).input_ids == [bos, c, d, e, eos]
    assert cut("keep_end", 5).labels == [-100, c, d, e, eos]
    assert cut("keep_end", 3).input_ids == [bos, e, eos]
    assert cut("keep_end", 3).labels == [-100, e, eos]
    with pytest.raises(ValueError, match="x:7 has 7 tokens, above max_length 6; raise"):
        cut("error", 6)
    assert cut("error", 7).input_ids[-1] == eos
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        Rendering(max_length=1)


def test_cut_at_the_start_the_first_token_is_not_learned():
    tokenizer = byte_tokenizer(add_bos=False)
    result = encode(
        Record("x:1", "abcdef"), tokenizer, Rendering(max_length=3, truncation="keep_end")
    )
    assert tokenizer.decode(result.input_ids) == "ef</s>"
    assert learned(tokenizer, result) == ["f</s>"]


# --- chats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NAMES))
def test_masks_are_exactly_the_answers(name):
    tokenizer, end = byte_tokenizer(NAMES[name]), ENDS[name]
    space = " " if name == "mistral" else ""
    # The plain template ends a turn by a new line only, so an EOS is added to the last one.
    middle, final = ("\n", "\n</s>") if name == "plain" else (end, end)
    one = encode(chat("2+2?", "It is 4."), tokenizer, Rendering())
    assert learned(tokenizer, one) == [f"{space}It is 4.{final}"]
    two = encode(chat("2+2?", "4", "3+3?", "6, sir"), tokenizer, Rendering())
    assert learned(tokenizer, two) == [f"{space}4{middle}", f"{space}6, sir{final}"]
    last = encode(chat("2+2?", "4", "3+3?", "6"), tokenizer, Rendering(loss_on="last"))
    assert learned(tokenizer, last) == [f"{space}6{final}"]
    for result in (one, two, last):
        text = tokenizer.apply_chat_template(chat("2+2?", "4").completion, tokenize=False)
        assert text.startswith("<s>") == (result.input_ids[0] == tokenizer.bos_token_id)
        assert result.input_ids.count(tokenizer.bos_token_id) <= 1
        assert result.notes == ()


@pytest.mark.parametrize("name", list(NAMES))
def test_training_tokens_are_inference_tokens(name):
    tokenizer = byte_tokenizer(NAMES[name])
    result = encode(chat("hi", "yes"), tokenizer, Rendering())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True
    )["input_ids"]
    assert result.input_ids[: len(prompt)] == prompt
    assert all(label == -100 for label in result.labels[: len(prompt)])
    assert result.labels[len(prompt)] != -100


def test_no_eos_is_added_after_a_turn_that_ends_by_itself():
    tokenizer = byte_tokenizer(GEMMA)
    result = encode(chat("hi", "yes"), tokenizer, Rendering())
    assert tokenizer.eos_token_id not in result.input_ids
    open_end = encode(chat("hi", "yes", "more?"), byte_tokenizer(PLAIN), Rendering())
    assert byte_tokenizer(PLAIN).eos_token_id not in open_end.input_ids


def test_loss_on_all_tokens_of_a_chat():
    tokenizer = byte_tokenizer(LLAMA3)
    result = encode(chat("hi", "yes"), tokenizer, Rendering(loss_on="all"))
    assert result.labels[1:] == result.input_ids[1:]
    assert result.input_ids.count(tokenizer.eos_token_id) == 2
    plain = byte_tokenizer(PLAIN)
    assert encode(chat("hi", "yes"), plain, Rendering(loss_on="all")).labels[-1] == (
        plain.eos_token_id
    )


def test_messages_in_prompt_and_completion():
    tokenizer = byte_tokenizer(CHATML)
    turns = chat("a", "b", "c", "d").completion
    record = Record("x:1", completion=turns[3:], prompt=turns[:3])
    assert learned(tokenizer, encode(record, tokenizer, Rendering())) == ["d<|im_end|>"]
    record = Record("x:1", completion="d", prompt=turns[:3])
    assert learned(tokenizer, encode(record, tokenizer, Rendering())) == ["d<|im_end|>"]
    marked = byte_tokenizer(MARKED)
    assert learned(marked, encode(record, marked, Rendering())) == ["d<|im_end|>"]
    record = Record("x:1", completion=turns[1:2], prompt="a")
    assert learned(tokenizer, encode(record, tokenizer, Rendering())) == ["b<|im_end|>"]


def test_plain_columns_become_turns_when_asked():
    tokenizer = byte_tokenizer(CHATML)
    record = Record("x:1", "4", "2+2", turn="two plus two")
    result = encode(record, tokenizer, Rendering(chat=True, prompt_format="{prompt}?"))
    assert tokenizer.decode(result.input_ids) == (
        "<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert learned(tokenizer, result) == ["4<|im_end|>"]
    plain = encode(record, tokenizer, Rendering())
    assert tokenizer.decode(plain.input_ids) == "2+24<|im_end|>"


def test_earlier_thinking_is_not_learned_wrongly():
    tokenizer = byte_tokenizer(QWEN3)
    thought = "<think>\nhm\n</think>\n\nfour"
    result = encode(chat("2+2?", thought), tokenizer, Rendering())
    assert learned(tokenizer, result) == [thought + "<|im_end|>"]
    assert result.notes == ()
    # The first answer is rendered without its thinking once another follows.
    result = encode(
        chat("2+2?", thought, "3+3?", "<think>\nok\n</think>\n\nsix"), tokenizer, Rendering()
    )
    assert learned(tokenizer, result) == ["<think>\nok\n</think>\n\nsix<|im_end|>"]
    assert result.notes[0].startswith("only the last assistant turn is learned")
    # The empty block is the template's, not the answer's.
    result = encode(chat("2+2?", "four"), tokenizer, Rendering())
    assert "<think>\n\n</think>" in tokenizer.decode(result.input_ids)
    assert learned(tokenizer, result) == ["four<|im_end|>"]
    # The last answer of a chat that ends with a question is rewritten: nothing can be learned.
    result = encode(chat("2+2?", thought, "3+3?"), tokenizer, Rendering())
    assert result.kind == "the chat template hides where the last assistant turn starts"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat("a"), "no assistant turn to learn"),
        (chat("a", "  "), "blank completion"),
        (chat("a", "b", system="s"), "the chat template raised: Roles must alternate"),
        (
            Record("test:1", completion=chat("a", "b").completion[1:]),
            "the chat template raised: Roles must alternate",
        ),
        (chat("a", "b\ud800"), "lone surrogate or undecodable byte in the text"),
        (chat("a", "b\0"), "NUL character in the text"),
    ],
)
def test_chat_rejections(record, reason):
    result = encode(record, byte_tokenizer(MISTRAL), Rendering())
    assert isinstance(result, Rejected) and result.origin == "test:1"
    assert result.reason.startswith(reason)


def test_a_chat_that_starts_with_an_answer():
    record = Record("x:1", completion=[{"role": "assistant", "content": "Hello"}])
    result = encode(record, byte_tokenizer(CHATML), Rendering())
    assert result == Rejected("the conversation starts with an assistant turn", "x:1")
    marked = byte_tokenizer(MARKED)
    assert learned(marked, encode(record, marked, Rendering())) == ["Hello<|im_end|>"]


def test_a_chat_needs_a_template():
    with pytest.raises(ValueError, match="test:1 is a chat, but the tokenizer has no chat templ"):
        encode(chat("a", "b"), byte_tokenizer(), Rendering())


def test_tools_reach_the_template():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + CHATML
    result = encode(chat("a", "b", tools=[{"name": "calc"}]), tokenizer, Rendering())
    assert tokenizer.decode(result.input_ids).startswith("calc<|im_start|>")
    assert learned(tokenizer, result) == ["b<|im_end|>"]


@pytest.mark.parametrize("name", list(NAMES))
def test_random_conversations(name):
    """The learned text is the answers, in order, each with its end; nothing else ever is."""
    tokenizer, end = byte_tokenizer(NAMES[name], merges=[("a", "b"), ("Ċ", "Ċ")]), ENDS[name]
    rng = random.Random(0)
    alphabet = "ab ?!é🙂4"

    def text():
        return "a" + "".join(rng.choices(alphabet, k=rng.randint(0, 9))) + "b"

    records = []
    for _ in range(60):
        contents = [text() for _ in range(2 * rng.randint(1, 4))]
        system = text() if name != "mistral" and rng.random() < 0.4 else None
        records.append((contents, chat(*contents, system=system)))
    results = encode_all([record for _, record in records], tokenizer, Rendering())
    for (contents, _), (_, result) in zip(records, results, strict=True):
        runs = learned(tokenizer, result)
        assert [run.replace(end, "").strip() for run in runs] == contents[1::2]
        assert runs[-1].endswith(end)
        assert result.labels[-1] != -100 or tokenizer.decode(result.input_ids[-1:]) == "\n"
        assert result.input_ids.count(tokenizer.bos_token_id) == ("bos_token" in NAMES[name])
