"""Predictions and references -> signed scores. No torch: predictions made anywhere can be scored anywhere.

ROUGE-1, ROUGE-2, ROUGE-L and BLEU-4 on jieba's words, in two styles:

chatglm3   the arithmetic of the ChatGLM3 fine-tuning demo, its rounding and scales included: ROUGE F x 100 rounded to
           4 places, BLEU on 0 to 1 with nltk's smoothing method 3, plain means over the samples. Where the demo
           crashed (a side without a word), the sample scores 0.
chatlora   the same with three repairs: an empty prediction scores 0, whitespace is not a word (control tokens are
           taken out by id before a text gets here), and everything stands on 0 to 100.

sacrebleu's corpus BLEU, a number other papers can be compared with, stands beside them in both styles.
"""

import contextlib
import functools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, get_args

from chatlora.cache import cache_root
from chatlora.config import Style
from chatlora.errors import PredictionsError

STYLES: tuple[Style, ...] = get_args(Style)
MEASURES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")  # one number a sample; sacrebleu's is one a corpus

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Scores:
    """What `score` found.

    values      measure -> number over all samples: `rouge-1`, `rouge-2`, `rouge-l`, `bleu-4`, `sacrebleu`
    signatures  measure -> how it was computed, fields separated by `|` as sacrebleu writes them
    per_sample  for each prediction, in order, the measures that exist for one sample (all but `sacrebleu`)
    """

    values: dict[str, float]
    signatures: dict[str, str]
    per_sample: list[dict[str, float]]

    @property
    def signature(self) -> str:
        """All signatures in one line."""
        return "; ".join(f"{name} = {signature}" for name, signature in self.signatures.items())


def score(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], *, style: Style = "chatlora"
) -> Scores:
    """Score each prediction against its reference, or its several references, exactly as the strings are given.

    With several references ROUGE takes the best one for each measure, BLEU all of them.
    Raises PredictionsError where there is nothing to score or the two sides do not match.
    """
    _check_sides(predictions, references, style)
    reference_lists = [[given] if isinstance(given, str) else list(given) for given in references]
    per_sample = [
        _score_sample(prediction, sample_references, style)
        for prediction, sample_references in zip(predictions, reference_lists, strict=True)
    ]
    values = {name: math.fsum(sample[name] for sample in per_sample) / len(per_sample) for name in MEASURES}
    signatures = _signatures(style, several=any(len(sample) > 1 for sample in reference_lists))
    values["sacrebleu"], signatures["sacrebleu"] = _corpus_bleu(predictions, reference_lists)
    return Scores(values, signatures, per_sample)


def _check_sides(predictions: Sequence[str], references: Sequence[str | Sequence[str]], style: str) -> None:
    problems = []
    if style not in STYLES:
        problems.append(f"style {style!r} is not known; choose one of {', '.join(STYLES)}.")
    if len(predictions) != len(references):
        problems.append(
            f"{len(predictions)} predictions stand against {len(references)} references; give one entry of "
            "references (a string, or a list of strings) for each prediction."
        )
    if not len(predictions):
        problems.append("there are no predictions, so there is nothing to score.")
    problems += [
        f"references[{index}] is an empty list; give at least one string (it may be empty)."
        for index, given in enumerate(references)
        if not isinstance(given, str) and not len(given)
    ]
    if problems:
        raise PredictionsError(*problems)


def _score_sample(prediction: str, references: Sequence[str], style: Style) -> dict[str, float]:
    predicted_words = split_words(prediction, style)
    reference_words = [words for words in (split_words(reference, style) for reference in references) if words]
    if not predicted_words or not reference_words:
        return dict.fromkeys(MEASURES, 0.0)
    pairs = [_rouge(predicted_words, words) for words in reference_words]
    sample = {name: max(pair[name] for pair in pairs) for name in pairs[0]}
    sample["bleu-4"] = _sentence_bleu(predicted_words, reference_words) * (100 if style == "chatlora" else 1)
    return sample


# ---- words


def split_words(text: str, style: Style) -> list[str]:
    """jieba's words of `text` without outer whitespace. In style `chatglm3` whitespace inside counts as words."""
    words: list[str] = _jieba().lcut(text.strip())
    return words if style == "chatglm3" else [word for word in words if not word.isspace()]


@functools.cache
def _jieba() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in its source, pkg_resources
        import jieba

    jieba.setLogLevel(logging.CRITICAL)  # it logs the loading of its dictionary to standard error
    # A tokenizer of our own: words that other code adds to jieba's shared one would change the scores. By default its
    # dictionary is cached under one name in the machine's shared temporary folder, where anybody could put another;
    # where ours cannot be written, jieba goes on without a cache.
    tokenizer = jieba.Tokenizer()
    folder = cache_root() / f"jieba-{version('jieba')}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer.tmp_dir = str(folder)
    tokenizer.initialize()
    return tokenizer


# ---- ROUGE


def _rouge(predicted_words: Sequence[str], reference_words: Sequence[str]) -> dict[str, float]:
    """F x 100 of ROUGE-1, ROUGE-2 and ROUGE-L, rounded to 4 places, as `rouge_chinese.Rouge` computes them."""
    predicted_line, reference_line = " ".join(predicted_words), " ".join(reference_words)
    ngram_scores = _ngram_rouge().get_scores(predicted_line, reference_line)[0]
    values = {name: ngram_scores[name]["f"] for name in ("rouge-1", "rouge-2")}
    values["rouge-l"] = rouge_l(predicted_line, reference_line)
    return {name: round(value * 100, 4) for name, value in values.items()}


@functools.cache
def _ngram_rouge() -> Any:
    from rouge_chinese import Rouge

    return Rouge(metrics=["rouge-1", "rouge-2"])


def rouge_l(predicted_line: str, reference_line: str) -> float:
    """ROUGE-L F (0 to 1) of two lines of words parted by spaces: `rouge_chinese`'s number, thousands of times faster.

    Its own longest common subsequence fills a Python dict with a tuple for each pair of words: 3 hours for 10,000
    samples of 1,200 words. Neither line may be empty or only whitespace.
    """
    from rapidfuzz.distance import LCSseq

    # Words become small integers first: rapidfuzz compares hashes, and those of strings may collide.
    numbers: dict[str, int] = {}
    predicted = [numbers.setdefault(word, len(numbers)) for word in _rouge_words(predicted_line)]
    reference = [numbers.setdefault(word, len(numbers)) for word in _rouge_words(reference_line)]
    common = LCSseq.similarity(predicted, reference)
    precision, recall = common / len(predicted), common / len(reference)
    return float(2.0 * ((precision * recall) / (precision + recall + 1e-8)))


def _rouge_words(line: str) -> list[str]:
    # rouge_chinese cuts a line into sentences first. That can split a word (seven dots) and, where a newline of the
    # text meets one of its cuts, leaves an empty sentence that counts as a word.
    sentences = [" ".join(sentence.split()) for sentence in _ngram_rouge().cut_sent(line) if sentence]
    return [word for sentence in sentences for word in sentence.split(" ")]


# ---- BLEU


def _sentence_bleu(predicted_words: Sequence[str], reference_words: Sequence[Sequence[str]]) -> float:
    sentence_bleu, smoothing = _nltk_bleu()
    return float(sentence_bleu(reference_words, predicted_words, smoothing_function=smoothing))


@functools.cache
def _nltk_bleu() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    return sentence_bleu, SmoothingFunction().method3


def _corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """sacrebleu's BLEU over all samples (0 to 100) and its own signature."""
    from sacrebleu.metrics import BLEU

    # By the references alone, so that two models scored on the same samples are cut into words the same way.
    bleu = BLEU(tokenize="zh" if mostly_han(text for sample in references for text in sample) else "13a")
    streams = max(len(sample) for sample in references)
    padded = [[*sample, *[None] * (streams - len(sample))] for sample in references]
    corpus = bleu.corpus_score(list(predictions), [list(stream) for stream in zip(*padded, strict=True)])
    return float(corpus.score), str(bleu.get_signature())


def mostly_han(texts: Iterable[str]) -> bool:
    """Whether more than half of all letters in `texts` are Han characters."""
    letters = han = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        han += len(_HAN.findall(text))
    return 2 * han > letters


# ---- signatures


def _signatures(style: Style, *, several: bool) -> dict[str, str]:
    def signature(**fields: str) -> str:
        return "|".join(f"{name}:{value}" for name, value in fields.items())

    words = {
        "style": style,
        "words": f"jieba-{version('jieba')}",
        "whitespace": "words" if style == "chatglm3" else "dropped",
    }
    empty = {"empty": "0", "mean": "samples"}
    rouge = {"value": "f1", "scale": "0-100", "round": "4", "refs": "best" if several else "1"}
    bleu = {"order": "4", "smooth": "method3", "refs": "all" if several else "1"}
    bleu_scale = "0-1" if style == "chatglm3" else "0-100"
    ngrams = signature(**words, **rouge, **empty, ngrams="sets", **{"rouge-chinese": version("rouge-chinese")})
    return {
        "rouge-1": ngrams,
        "rouge-2": ngrams,
        "rouge-l": signature(
            **words,
            **rouge,
            **empty,
            lcs="rapidfuzz-" + version("rapidfuzz"),
            like="rouge-chinese-" + version("rouge-chinese"),
        ),
        "bleu-4": signature(**words, **bleu, scale=bleu_scale, **empty, nltk=version("nltk")),
    }
