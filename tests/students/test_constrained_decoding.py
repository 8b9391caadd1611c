"""Constrained decoding and label ranking, compared with all answers listed and every step run without a cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mint_ray.config.loader import UserError
from mint_ray.ontology import read_annotations
from mint_ray.records import Label, Message
from mint_ray.students.config import Generation, Student
from mint_ray.students.constrained_decoding import AllowedAnswers, AnswerTokens, DecodingState
from mint_ray.students.generation import StudentGenerator
from mint_ray.students.loading import load_model, load_tokenizer
from mint_ray.tasks import build_task, make_labels
from mint_ray.tasks.config import RareDisease
from tests.tiny import CHAT_TEMPLATE, CORPUS, save_tiny_student

# one name is a prefix of another, one contains a quotation mark, one consists mostly of unknown characters
NAMES = ["Noonan syndrome", "Noonan syndrome 1", "Noonan syndrome 12", "Ménière's disease", "Marfan syndrome"]
LABELS = [Label(label_id=f"OMIM:{number}", name=name) for number, name in enumerate(NAMES, start=1)]
PROMPTS = [
    [Message(role="user", content=text)]
    for text in (
        "Which diseases fit this case best?",
        "A boy of four years with short stature, seizures and a broad nasal bridge was seen at the clinic. " * 3,
        "liver",
    )
]
LINES = ["POTENTIAL_DISEASES:", *(f"{number}. 'Noonan syndrome'" for number in range(1, 5)), "1. 'Marfan", "'\n2. 'Ma"]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def across_borders() -> PreTrainedTokenizerFast:
    """Byte-level BPE without pre-tokenization: it merges across quotation marks, spaces and line ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["\n".join(LINES)] * 20 + CORPUS, trainer)
    return wrap(tokenizer)


def pieces() -> PreTrainedTokenizerFast:
    """BPE in SentencePiece style: spaces belong to the words, and unknown characters are encoded as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n".join(LINES)] * 20 + CORPUS, trainer)
    # the trainer accepts bytes only as special tokens, which decoding would skip
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if not token["content"].startswith("<0x")]
    return wrap(Tokenizer.from_str(json.dumps(settings)))


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast] | None] = {
    "words": None,
    "across borders": across_borders,
    "pieces": pieces,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = save_tiny_student(tmp_path_factory.mktemp("student") / "tiny")
    make = MAKERS[request.param]
    if make is not None:
        make().save_pretrained(folder)
    return Student(model_id=str(folder))


def answers_of(labels: Sequence[Label], length: int) -> AllowedAnswers:
    task = build_task(RareDisease(), labels, length)
    return AllowedAnswers(labels=tuple(label.label_id for label in labels), length=length, to_text=task.answer)


def make_generator(student: Student, answers: AllowedAnswers, **generation: Any) -> StudentGenerator:
    return StudentGenerator(student, Generation(**generation), answers=answers, batch_size=2)


def rendered(student: Student, prompt: list[Message]) -> str:
    turns = [dataclasses.asdict(message) for message in prompt]
    return str(load_tokenizer(student).apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def tokens_after(student: Student, before: str, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt, and those of the answer after it."""
    tokenizer = load_tokenizer(student)
    prompt, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + text))
    assert both[: len(prompt)] == prompt
    return prompt, both[len(prompt) :]


def test_only_the_word_tokenizer_keeps_words_apart(student: Student, request: pytest.FixtureRequest) -> None:
    words = load_tokenizer(student).tokenize("1. 'Noonan syndrome'\n2. 'Marfan syndrome'")
    across = [word for word in words if "'" in word and word.strip("ĠĊ▁\n'") != ""]
    assert bool(across) == ("words" not in request.node.callspec.id)


@pytest.mark.parametrize("length", [1, 3])
def test_constrained_decoding_takes_the_most_likely_token_of_all_answers(student: Student, length: int) -> None:
    answers = answers_of(LABELS, length)
    tokenizer, model = load_tokenizer(student), load_model(student)
    for prompt, text in zip(PROMPTS, make_generator(student, answers).generate_constrained(PROMPTS), strict=True):
        before = rendered(student, prompt)
        every = [
            [*tokens_after(student, before, answers.to_text(labels))[1], tokenizer.eos_token_id]
            for labels in permutations(answers.labels, length)
        ]
        ids, _ = tokens_after(student, before, "POTENTIAL")
        prompt_length = len(ids)
        while ids[-1] != tokenizer.eos_token_id or len(ids) == prompt_length:
            written = ids[prompt_length:]
            allowed = sorted({one[len(written)] for one in every if one[: len(written)] == written})
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1]
            ids = [*ids, allowed[int(logits[allowed].argmax())]]
        assert text.strip() == tokenizer.decode(ids[prompt_length:-1]).strip()


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_the_score_of_a_label_is_the_log_probability_of_its_name(student: Student, normalization: str) -> None:
    answers = answers_of(LABELS, 2)
    model, generator = load_model(student), make_generator(student, answers, length_normalization=normalization)
    names = generator.answer_tokens.first_label_tokens
    shared = next(at for at in range(100) if len({name[at] for name in names}) > 1)
    for prompt, found in zip(PROMPTS, generator.rank(PROMPTS), strict=True):
        ids, _ = tokens_after(student, rendered(student, prompt), "POTENTIAL")
        for name, score in zip(names, found, strict=True):
            with torch.inference_mode():
                logps = model(torch.tensor([ids + name])).logits[0].double().log_softmax(-1)
            own = [float(logps[len(ids) - 1 + at, name[at]]) for at in range(shared, len(name))]
            expected = sum(own) / len(own) if normalization == "mean" else sum(own)
            assert score == pytest.approx(expected, abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2])
def test_the_ranked_tokens_are_those_of_the_first_label_in_an_answer(student: Student, length: int) -> None:
    answers = answers_of(LABELS, length)
    answer_tokens = AnswerTokens(load_tokenizer(student), answers, "")
    assert len({tuple(name) for name in answer_tokens.first_label_tokens}) == len(LABELS)
    for label, name in zip(answers.labels, answer_tokens.first_label_tokens, strict=True):
        text = load_tokenizer(student).decode(name, skip_special_tokens=True)
        assert text.strip().startswith(answers.to_text([label]))
        complete = [
            answers.to_text([label, *more]) for more in permutations(answers.labels, length - 1) if label not in more
        ]
        assert any(one.startswith(text.strip()) for one in complete)
        # no name is a prefix of another, or the shorter one would always be at least as likely
        others = [other for other in answer_tokens.first_label_tokens if other is not name]
        assert not [other for other in others if other[: len(name)] == name]


def test_answers_and_scores_do_not_depend_on_the_batch(student: Student) -> None:
    generator = make_generator(student, answers_of(LABELS, 3), max_new_tokens=12)
    chosen, ranked = generator.generate_constrained(PROMPTS), generator.rank(PROMPTS)
    assert generator.generate_constrained(PROMPTS[::-1]) == chosen[::-1]
    assert [generator.generate_constrained([prompt])[0] for prompt in PROMPTS] == chosen
    assert [generator.rank([prompt])[0] for prompt in PROMPTS] == ranked
    # ranking does not change free answers
    free = StudentGenerator(student, Generation(max_new_tokens=12))
    assert generator.generate(PROMPTS) == free.generate(PROMPTS)


@pytest.fixture(scope="module")
def real() -> list[Label]:
    """Sixty diseases of the annotations, first those whose names are hard to distinguish or to encode."""
    names = {row.disease_id: row.disease_name for row in read_annotations()}
    hard = sorted(names, key=lambda key: (not set("'\"();,/") & set(names[key]), key))
    return make_labels({key: [names[key]] for key in [*hard[:40], *sorted(names)[-20:]]}, RareDisease())


def test_an_untrained_student_names_only_labels(student: Student, real: list[Label]) -> None:
    task = build_task(RareDisease(), real, 3)
    texts = make_generator(student, answers_of(real, 3)).generate_constrained(PROMPTS[:2])
    for text in texts:
        read = task.parse(text)
        assert read.reason is None
        assert len(set(read.labels)) == 3
        assert set(read.labels) <= {label.label_id for label in real}
    # in free mode it names none
    free = StudentGenerator(student, Generation(max_new_tokens=40)).generate(PROMPTS[:2])
    assert not any(any(task.parse(text).labels) for text in free)


def test_every_label_can_be_generated_and_parsed(student: Student, real: list[Label]) -> None:
    task, answers = build_task(RareDisease(), real, 3), answers_of(real, 3)
    answer_tokens = AnswerTokens(load_tokenizer(student), answers, "")
    before = rendered(student, PROMPTS[0])
    for start in range(0, len(real), 3):
        labels = list(answers.labels[start : start + 3])
        state = DecodingState(answer_tokens)
        for token in [*tokens_after(student, before, answers.to_text(labels))[1], answer_tokens.eos_id][
            len(state.token_ids) :
        ]:
            assert token in state.allowed_tokens()
            state.append(token)
        assert state.labels == tuple(labels)
        assert task.parse(state.text()).labels == labels
        assert len(state.token_ids) <= answer_tokens.max_tokens


def test_a_prompt_too_long_for_the_longest_answer_is_rejected(student: Student) -> None:
    generator = make_generator(student, answers_of(LABELS, 5))
    long = [Message(role="user", content="0 " * 1020)]
    with pytest.raises(UserError, match=r"exceed the model's context of 2048"):
        generator.generate_constrained([long])


def test_an_answer_cannot_have_more_labels_than_there_are() -> None:
    with pytest.raises(ValueError, match="length must lie between 1 and the number of labels, got 6"):
        answers_of(LABELS, 6)


def test_a_tokenizer_without_offsets_is_rejected() -> None:
    with pytest.raises(UserError, match="model_id: m: its tokenizer does not map tokens to characters"):
        AnswerTokens(ByT5Tokenizer(), answers_of(LABELS, 2), "m")
