"""A text that arrives in pieces has the scores of the whole text's prefixes, however it is cut."""

import numpy as np
import pytest
import torch
from extracted_rows import watching
from growing_texts import LABELS, TEXTS, cut, growing, letters, scores_by_hand, words
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from tiny_models import ALL, TINY, tiny_tokenizer

from skspin import (
    LLMActivationTransformer,
    PrefixScorer,
    PrefixStreamer,
    make_spin_pipeline,
    score_prefixes,
)

NEW = "word3 word30 word31 word7 word8 word1 word2 word9"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DECODERS = [
    "gpt2", "llama", "opt", "bloom", "gpt-neox", "gptj", "falcon", "mistral", "gemma2", "gemma3",
    "phi3", "qwen2", "qwen3", "stablelm", "cohere",
]  # fmt: skip


def pushed(scorer, pieces, *, final=True):
    """Push all pieces; join the decision values (n_tokens, n_values) and token names that come."""
    found = [scorer.push(piece) for piece in pieces]
    if final:
        found.append(scorer.push("", final=True))
    values = np.concatenate([part.decision_values[0] for part in found])
    np.testing.assert_array_equal(scorer.scores.decision_values[0], values)
    return values


@pytest.mark.parametrize("name", DECODERS)
def test_every_prefix_scores_as_the_model_fed_with_its_ids(name):
    spin = growing(name)
    ids = spin["activations"].tokenizer(NEW)["input_ids"]
    expected = scores_by_hand(spin, cut(ids, head=1))
    found = score_prefixes(spin, ["word5 unknown word9", NEW]).decision_values[1]
    np.testing.assert_allclose(found, expected, **CLOSE)
    scorer = PrefixScorer(spin)
    for pieces in (ids[1:], [ids[1:4], ids[4:]]):
        values = pushed(scorer.reset(), pieces, final=False)
        np.testing.assert_allclose(values, expected, **CLOSE)


@pytest.mark.parametrize("params", [{"layers": 0}, {"site": ("mlp", "attention")}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_layer_and_site_can_be_read_on(name, params):
    spin = growing(name, **params)
    ids = spin["activations"].tokenizer(NEW, add_special_tokens=False)["input_ids"]
    expected = score_prefixes(spin, [NEW]).decision_values[0]
    np.testing.assert_allclose(pushed(PrefixScorer(spin), ids, final=False), expected, **CLOSE)


def test_halves_of_a_surrogate_pair_are_joined_across_pieces():
    spin = growing("gpt2", tokenizer=letters(), changes={"n_positions": 128})
    whole = score_prefixes(spin, ["a \U0001f642 \udc00 bc"])
    scorer = PrefixScorer(spin)
    pushed(scorer, ["a \ud83d", "\ude42 \udc00", " bc"])
    assert scorer.text == "a \U0001f642 \udc00 bc"
    one, other = (scores.to_frame().drop(columns="score") for scores in (scorer.scores, whole))
    assert one.equals(other)
    assert scorer.scores.tokens[0].text == whole.tokens[0].text == "a \U0001f642 \ufffd bc"


def test_tokens_have_one_name_however_they_come():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "\u2581", *"abcdefgh"]
    bare = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    bare.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "pad_token": "<s>"}
    spin = growing(tokenizer=PreTrainedTokenizerFast(tokenizer_object=bare, **special))
    scorer = PrefixScorer(spin)
    scorer.push("ab \u5f88 c", final=True)
    names = score_prefixes(spin, ["ab \u5f88 c"]).tokens[0].tokens
    assert scorer.scores.tokens[0].tokens == names and "<unk>" in names


def test_each_token_goes_through_the_model_once():
    spin = growing()
    scorer = PrefixScorer(spin)
    seen = []
    with watching(spin["activations"].model, lambda ids: seen.append(ids.numel())):
        for token in (5, 6, 7):
            scorer.push(token)
        scorer.push([])
        scorer.push([8, 9])
    assert seen == [2, 1, 1, 2]  # the first with the start's token


BYTES = "It  was a fine film,\nand\t I'd see it — twice. 好电影 \n ok"


def assert_cut_anywhere(spin, text):
    """Push a text in pieces of several sizes, and find the scores of the whole text."""
    whole, scorer = score_prefixes(spin, [text]), PrefixScorer(spin)
    for size in (1, 3, 7, 100):
        scorer.reset()
        values = pushed(scorer, [text[at : at + size] for at in range(0, len(text), size)])
        np.testing.assert_allclose(values, whole.decision_values[0], **CLOSE)
        assert scorer.text == text
        for name in ("tokens", "starts", "ends", "is_truncated"):
            one, other = (getattr(scores.tokens[0], name) for scores in (scorer.scores, whole))
            np.testing.assert_array_equal(one, other)
    return whole.tokens[0]


@pytest.mark.parametrize("prompt", [None, "Say: {text}"])
def test_a_text_may_be_cut_anywhere(prompt):
    spin = growing("gpt2", tokenizer=letters(), prompt=prompt, changes={"n_positions": 128})
    assert_cut_anywhere(spin, BYTES)


def merging():
    """Train a tokenizer whose tokens are of several letters, or of marks and ends of lines."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = r" ?\w+| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as of Llama 3 and Qwen
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*TEXTS, BYTES, "the end.\n\nThe film  was.\n"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_letters_that_may_still_merge_are_held_back():
    spin = growing("llama", tokenizer=merging(), changes={"max_position_embeddings": 200})
    text = f"word1 the film.\n\n The end.\n{BYTES}  "
    assert len(assert_cut_anywhere(spin, text).tokens) < len(text) * 0.7


def joining(*pair):
    """Make a tokenizer of bytes, in which two in a row are one token."""
    from tokenizers import models, pre_tokenizers

    tokenizer = letters()
    bare = tokenizer.backend_tokenizer
    vocabulary = {**bare.get_vocab(), "".join(pair): bare.get_vocab_size()}
    bare.model = models.BPE(vocabulary, [pair])
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@pytest.mark.parametrize("text", ["It was.", "."])
def test_a_token_that_goes_on_in_the_prompt_is_scored(text):
    params = {"prompt": 'Say: "{text}" So?', "pool_over": "text"}
    spin = growing("gpt2", tokenizer=joining(".", '"'), changes={"n_positions": 128}, **params)
    scores = PrefixScorer(spin).push(text, final=True)
    np.testing.assert_allclose(
        scores.decision_values[0][-1], spin.decision_function([text]), **CLOSE
    )
    tokens = assert_cut_anywhere(spin, text)
    assert tokens.tokens[-1] == '."' and tokens.surfaces()[-1] == "."


@pytest.mark.filterwarnings("ignore:.*longer than max_length")
@pytest.mark.parametrize(
    ("text", "long_texts", "n_tokens"),
    [
        ("It was so.", "windows", 10),
        ("It was so.", "truncate", 10),
        ("It was so fine.", "truncate", 10),
        ("It was so fine", "truncate", 9),
    ],
)
def test_a_text_whose_end_joins_the_prompt_has_its_room(text, long_texts, n_tokens):
    params = {"prompt": '"{text}"', "pool_over": "text", "long_texts": long_texts}
    spin = growing("gpt2", tokenizer=joining(".", '"'), max_length=12, **params)
    assert len(assert_cut_anywhere(spin, text).tokens) == n_tokens


def test_windows_do_not_depend_on_what_one_letter_joins():
    params = {"prompt": "({text})", "pool_over": "text", "long_texts": "windows"}
    for letter in "ab":
        spin = growing("gpt2", tokenizer=joining(letter, ")"), max_length=12, **params)
        assert_cut_anywhere(spin, "It was a fine film, so to speak")


def test_windows_of_a_text_whose_end_joins_the_prompt_are_cut_before_that_is_known():
    params = {"prompt": '"{text}"', "pool_over": "text", "long_texts": "windows"}
    spin = growing("gpt2", tokenizer=joining(".", '"'), max_length=12, **params)
    text = "It was a fine film, so to speak"
    scorer, closed = PrefixScorer(spin), f"{text}."
    whole = pushed(scorer, [closed])
    np.testing.assert_allclose(pushed(scorer.reset(), list(closed)), whole, **CLOSE)
    open_end = score_prefixes(spin, [text]).decision_values[0]
    np.testing.assert_allclose(whole[: len(open_end)], open_end, **CLOSE)
    first = score_prefixes(spin, [closed]).decision_values[0][:9]
    np.testing.assert_allclose(whole[:9], first, **CLOSE)


def test_a_control_character_that_the_tokenizer_deletes_ends_no_word():
    from tokenizers import normalizers

    tokenizer = merging()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    spin = growing("llama", tokenizer=tokenizer, changes={"max_position_embeddings": 200})
    for control in "\x0b\x0c\x1c\x1d\x1e\x1f\x85":
        tokens = assert_cut_anywhere(spin, f"the fi{control}lm word{control}1 was")
        assert "film" in [token.strip("Ġ") for token in tokens.tokens]


def test_ids_tell_their_characters():
    tokenizer = letters()
    spin = growing("gpt2", tokenizer=tokenizer, changes={"n_positions": 128})
    scorer = PrefixScorer(spin)
    scorer.push(tokenizer("a 好", add_special_tokens=False)["input_ids"])
    tokens = scorer.scores.tokens[0]
    assert scorer.text == "a 好"
    assert tokens.starts.tolist() == [0, 1, 2, 2, 2] and tokens.ends.tolist() == [1, 2, 2, 2, 3]


def test_a_replacement_character_at_the_end_is_the_texts():
    tokenizer = letters()
    scorer = PrefixScorer(growing("gpt2", tokenizer=tokenizer, changes={"n_positions": 128}))
    scorer.push(tokenizer("a \ufffd", add_special_tokens=False)["input_ids"], final=True)
    assert scorer.text == "a \ufffd" and scorer.scores.tokens[0].ends[-1] == 3


@pytest.mark.parametrize("overlap", [0, 2])
def test_windows_of_a_long_text_are_merged_for_every_prefix(overlap):
    spin = growing(
        "gpt2", max_length=7, long_texts="windows", overlap=overlap, prompt="word40 {text}"
    )
    text = " ".join(f"word{i}" for i in range(20, 35))
    start, before, *own = spin["activations"].tokenizer(f"word40 {text}")["input_ids"]
    prefixes = []
    for end in range(1, len(own) + 1):
        windows = []
        for at in range(0, max(end - overlap, 1), 5 - overlap):
            shared = overlap if at else 0  # have the longer context in the window before
            stretch = own[at : min(at + 5, end)]
            pooled = [0, 1, *range(2 + shared, 2 + len(stretch))]
            windows.append(([start, before, *stretch], pooled))
        prefixes.append(windows)
    expected = scores_by_hand(spin, prefixes)
    np.testing.assert_allclose(expected[-1], spin.decision_function([text]), **CLOSE)
    found = score_prefixes(spin, [text]).decision_values[0]
    np.testing.assert_allclose(found, expected, **CLOSE)
    scorer = PrefixScorer(spin)
    np.testing.assert_allclose(pushed(scorer, [text]), expected, **CLOSE)
    np.testing.assert_allclose(pushed(scorer.reset(), own, final=False), expected, **CLOSE)


def test_a_text_that_is_cut_has_scores_up_to_there():
    spin = growing("gpt2", max_length=7)
    spin.set_params(activations__max_length=99)  # has no effect before the next fit
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than max_length=7"):
        scores = score_prefixes(spin, [NEW, "word5 unknown word9"])
    assert scores.tokens[0].surfaces() == NEW.split()[:6]
    with pytest.warns(UserWarning, match="truncated"):
        whole = spin.decision_function([NEW])
    expected = scores.decision_values[0]
    np.testing.assert_allclose(expected[-1, 0], whole[0], **CLOSE)
    scorer = PrefixScorer(spin)
    with pytest.warns(UserWarning, match="longer than max_length=7") as told:
        values = pushed(scorer, [NEW, " more", " and more"])
    assert len(told) == 1 and scorer.scores.tokens[0].is_truncated
    np.testing.assert_allclose(values, expected, **CLOSE)
    tokenizer = words()
    tokenizer.truncation_side = "left"
    spin = growing(max_length=7, tokenizer=tokenizer)
    for score in (lambda: score_prefixes(spin, [NEW]), lambda: PrefixScorer(spin).push(NEW)):
        with pytest.raises(ValueError, match="truncation_side='left' drops the first"):
            score()


def test_what_comes_after_the_text_takes_room_and_is_not_read():
    spin = growing(
        "gpt2", tokenizer=tiny_tokenizer(), prompt="{text} word41", pool_over="text", max_length=9
    )
    with pytest.warns(UserWarning, match="truncated"):
        expected = score_prefixes(spin, [NEW]).decision_values[0]
    with pytest.warns(UserWarning, match="longer than max_length=9"):
        values = pushed(PrefixScorer(spin), [NEW])
    np.testing.assert_allclose(values, expected, **CLOSE)
    with pytest.raises(ValueError, match="pool_over='all' pools them"):
        PrefixScorer(growing(tokenizer=tiny_tokenizer()))


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def test_a_conversation_grows_by_turns():
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    spin = growing(
        tokenizer=tokenizer, pool_over="text", fit=False, changes={"max_position_embeddings": 200}
    )
    said = [{"role": "user", "content": "Is it?"}]
    talks = [[*said, {"role": "assistant", "content": answer}] for answer in ("No, no.", "Yes.")]
    spin.fit(talks * 4, [0, 1] * 4)
    whole = score_prefixes(spin, talks[:1])
    of_answer = whole.tokens[0].messages == 1
    expected = whole.decision_values[0][of_answer]
    scorer = PrefixScorer(spin, said)
    np.testing.assert_allclose(pushed(scorer, list("No, no.")), expected, **CLOSE)
    assert scorer.text == "No, no."
    ids = tokenizer("No, no.", add_special_tokens=False)["input_ids"]
    np.testing.assert_allclose(pushed(scorer.reset(), ids, final=False), expected, **CLOSE)
    last = pushed(scorer.reset([*talks[0]], role="user"), ["So it goes."])[-1]
    more = [*talks[0], {"role": "user", "content": "So it goes."}]
    np.testing.assert_allclose(last, spin.decision_function([more]), **CLOSE)
    first = pushed(scorer.reset([], role="user"), ["Is it?"])[-1]
    np.testing.assert_allclose(first, spin.decision_function([said]), **CLOSE)
    with pytest.raises(ValueError, match="must be a dict with the str"):
        scorer.reset(["Is it?"])
    params = {"max_length": 60, "long_texts": "windows", "pool_over": "text"}
    narrow = growing(tokenizer=tokenizer, fit=False, **params).fit(talks * 4, [0, 1] * 4)
    with pytest.raises(ValueError, match="can't go on in windows while it grows"):
        PrefixScorer(narrow, said).push("No, no. " * 8)
    with pytest.raises(ValueError, match="model's limit of 48 tokens leaves no room for text"):
        PrefixScorer(narrow, [{"role": "user", "content": "Is it? " * 10}]).push("No, no.")
    asked = [[{"role": "user", "content": text}] for text in ("Is it?", "Why?")]
    deaf = growing(tokenizer=tokenizer, pool_over="user", fit=False).fit(asked * 4, [0, 1] * 4)
    with pytest.raises(ValueError, match="does not pool what role='assistant' says"):
        PrefixScorer(deaf, said)
    with pytest.raises(ValueError, match="names roles of conversations, but X holds texts"):
        PrefixScorer(deaf)


def test_pieces_of_another_kind_are_refused():
    scorer = PrefixScorer(growing())
    scorer.push([5, 6])
    with pytest.raises(TypeError, match="piece is a str, but this text came as int so far"):
        scorer.push("word1")
    for piece in (1.5, [[1]], None, ["a"]):
        with pytest.raises(TypeError, match="a str is needed, a token id"):
            scorer.push(piece)
    for piece in (-1, 10_000):
        with pytest.raises(ValueError, match="token ids outside 0 to"):
            scorer.push(piece)
    scorer.push(7, final=True)
    with pytest.raises(ValueError, match="has ended"):
        scorer.push(7)
    assert scorer.reset().push("word1", final=True).tokens[0].tokens == ["word1"]
    assert len(scorer.reset().scores.tokens[0].tokens) == 0


def test_models_and_pipelines_that_cant_are_refused():
    with pytest.raises(ValueError, match="looks ahead"):
        PrefixScorer(growing("bert"))
    stripped = make_pipeline(FunctionTransformer(lambda texts: texts), growing(fit=False))
    with pytest.raises(ValueError, match="begins with a FunctionTransformer"):
        PrefixScorer(stripped.fit(TEXTS, LABELS))
    activations = LLMActivationTransformer(ALL["mamba"].build(), tokenizer=words(), cache=None)
    mamba = make_pipeline(activations, LogisticRegression()).fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match="can't read a text in pieces with a key-value cache"):
        PrefixScorer(mamba)


@pytest.fixture(scope="module")
def written():
    """A model that generates, a pipeline on its activations, and a prompt."""
    tokenizer = words()
    model = TINY["llama"].build("ForCausalLM", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    spin = make_spin_pipeline(
        model, tokenizer=tokenizer, sparsity=0, site="hidden", dtype="float32"
    )
    spin = spin.set_params(select__C=1.0).fit(TEXTS, LABELS)
    prompt = tokenizer("word1 word2", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model, tokenizer, spin, prompt, options


def test_a_streamer_scores_what_is_generated(written):
    model, tokenizer, spin, prompt, options = written
    guard = PrefixStreamer(PrefixScorer(spin), tokenizer)
    for _ in range(2):  # each call is a new text
        ids = model.generate(prompt, streamer=guard, **options)[0, prompt.shape[1] :].tolist()
        ids = [token for token in ids if token not in tokenizer.all_special_ids]
        expected = scores_by_hand(spin, cut([tokenizer.bos_token_id, *ids], head=1))
        np.testing.assert_allclose(guard.scorer.scores.decision_values[0], expected, **CLOSE)
    assert guard.crossing_ is None


def test_a_call_after_an_interrupted_one_is_a_new_text(written):
    model, tokenizer, spin, prompt, options = written
    guard = PrefixStreamer(PrefixScorer(spin), tokenizer)
    model.generate(prompt, streamer=guard, **options)
    expected = guard.scorer.text

    def interrupt(ids, scores):
        if ids.shape[1] == prompt.shape[1] + 2:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, streamer=guard, stopping_criteria=[interrupt], **options)
    model.generate(prompt, streamer=guard, **options)
    assert guard.scorer.text == expected


def test_a_streamer_stops_at_the_token_that_reaches_the_threshold(written):
    model, tokenizer, spin, prompt, options = written
    guard = PrefixStreamer(PrefixScorer(spin), tokenizer)
    model.generate(prompt, streamer=guard, **options)
    values = guard.scorer.scores.for_class(1, response_method="predict_proba")[0]
    first, threshold = int(values.argmax()), values.max()
    assert first > 0
    guard = PrefixStreamer(
        guard.scorer, tokenizer, threshold, label=1, response_method="predict_proba"
    )
    ids = model.generate(prompt, streamer=guard, stopping_criteria=[guard], **options)
    shown = [t for t in ids[0, prompt.shape[1] :].tolist() if t not in tokenizer.all_special_ids]
    assert len(shown) == first + 1 == guard.scorer.n_tokens
    assert guard.crossing_.token == first
    np.testing.assert_allclose(guard.crossing_.score, threshold, rtol=1e-5)


def test_another_models_text_is_tokenized_anew(written):
    model, tokenizer, _, prompt, options = written
    spin = growing("gpt2", tokenizer=letters(), changes={"n_positions": 200})
    guard = PrefixStreamer(PrefixScorer(spin), tokenizer, threshold=-np.inf)
    ids = model.generate(prompt, streamer=guard, **options)[0, prompt.shape[1] :]
    text = guard.scorer.text
    assert text.split() == tokenizer.decode(ids, skip_special_tokens=True).split()
    expected = score_prefixes(spin, [text]).decision_values[0]
    np.testing.assert_allclose(guard.scorer.scores.decision_values[0], expected, **CLOSE)
    assert guard.crossing_.token == 0


def test_streamers_refuse_what_they_cant_score(written):
    model, tokenizer, spin, prompt, options = written
    guard = PrefixStreamer(PrefixScorer(spin), tokenizer)
    with pytest.raises(ValueError, match="writes 2 texts at once"):
        model.generate(prompt.repeat(2, 1), streamer=guard, **options)
    with pytest.raises(ValueError, match="has to be the streamer, too"):
        model.generate(
            prompt, stopping_criteria=[PrefixStreamer(PrefixScorer(spin), tokenizer)], **options
        )
    with pytest.raises(ValueError, match="label='x' must be one of the classes"):
        PrefixStreamer(PrefixScorer(spin), tokenizer, 0.0, label="x")
    with pytest.raises(TypeError, match=r"scorer is a Pipeline.*PrefixScorer\(pipeline\)"):
        PrefixStreamer(spin, tokenizer)
    for threshold in (np.nan, "0.5"):
        with pytest.raises(ValueError, match=f"threshold={threshold!r} must be a number"):
            PrefixStreamer(PrefixScorer(spin), tokenizer, threshold)
