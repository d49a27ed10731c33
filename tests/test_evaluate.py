"""Scores by hand, and the commands that print text and scores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import build, some_tokens
from tiny import train, write_corpus

from fastlm import evaluate as evaluate_module
from fastlm import generate as generate_module
from fastlm.errors import InputError
from fastlm.evaluate import Evaluation, evaluate
from fastlm.samples import Sample, append_sample, drop_samples_after, opening, tokenizable_share, tokenizes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("evaluate")
    train(write_corpus(folder / "corpus.txt"), folder / "run", steps=40)
    return folder / "run"


def test_sums_by_hand():
    model, tokens = build(), some_tokens(3)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    token_bytes = np.arange(61) % 4  # every fourth token is special: it stands for no bytes
    result = evaluate(model, [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])], token_bytes, accuracy=True)
    log_p = model(tokens).detach().double().log_softmax(-1)
    nats = text_nats = length = correct = count = 0.0
    for b in range(3):
        for t in range(23):
            target = int(targets[b, t])
            count += 1
            nats -= float(log_p[b, t, target])
            if target % 4:
                text_nats -= float(log_p[b, t, target])
                length += target % 4
            correct += int(log_p[b, t].argmax()) == target
    assert (result.tokens, result.text_bytes, result.correct) == (count, length, correct)
    assert result.loss == pytest.approx(nats / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(text_nats / length / math.log(2), rel=1e-5)
    assert result.accuracy == correct / count


def test_unknown_lengths_give_no_bits_per_byte():
    result = evaluate(build(), [(some_tokens(), some_tokens(seed=1))], None)
    assert result.bits_per_byte is None
    assert result.accuracy is None


def test_perplexity_does_not_overflow():
    assert Evaluation(tokens=1, nats=5000.0, text_nats=0, text_bytes=None, correct=None).perplexity == math.inf


def test_evaluation_keeps_no_graph_and_no_gradient():
    model = build()
    evaluate(model, [(some_tokens(), some_tokens(seed=1))], None)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_command_agrees_with_the_run(run: Path, capsys: pytest.CaptureFixture[str]):
    evaluate_module.main([str(run)])
    report = json.loads(capsys.readouterr().out)
    final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"full": true' in line]
    assert report["loss"] == pytest.approx(final[-1]["val_loss"], rel=1e-6)
    assert report["bits_per_byte"] == pytest.approx(final[-1]["bits_per_byte"], rel=1e-6)
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert 0.1 < report["accuracy"] < 1
    assert report["step"] == 40


def test_the_command_takes_another_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "other.txt").write_text("the cat sleeps over the dog.\n" * 30)
    evaluate_module.main([str(run), "--data.path", str(tmp_path / "other.txt"), "--metrics", "loss"])
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 29 * 30 - 1
    assert "accuracy" not in report


def test_a_validation_split_that_changed_is_refused(tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus.txt")
    train(corpus, tmp_path / "run")
    corpus.write_text(corpus.read_text().replace("cat", "cow"))
    with pytest.raises(InputError, match="changed since"):
        evaluate_module.main([str(tmp_path / "run")])


def test_generate_prints_prompt_and_samples(run: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(run), "--prompt", "the cat", "--max_new_tokens", "20", "--num_samples", "2", "--seed", "3"]
    generate_module.main(arguments)
    first = capsys.readouterr().out
    generate_module.main(arguments)
    assert capsys.readouterr().out == first
    texts = first.split("--- sample ")[1:]
    assert len(texts) == 2
    assert all(text.split("\n", 1)[1].startswith("the cat") for text in texts)
    assert len(texts[0].split("\n", 1)[1].rstrip("\n")) == len("the cat") + 20


def test_generate_without_a_prompt_begins_a_text(run: Path, capsys: pytest.CaptureFixture[str]):
    generate_module.main([str(run), "--max_new_tokens", "5"])
    assert len(capsys.readouterr().out) >= 5


@pytest.mark.parametrize(
    ("module", "arguments", "told"),
    [
        (generate_module, [], "RUN"),
        (generate_module, ["{run}/nowhere"], "nowhere"),
        (generate_module, ["{run}", "--prompt", "Ünknown"], "Ü"),
        (generate_module, ["{run}", "--temperature", "-1"], "--temperature: got -1"),
        (generate_module, ["{run}", "--max_new_tokens", "0"], "--max_new_tokens: got 0"),
        (generate_module, ["{run}", "--top_p", "1.5"], "--top_p: got 1.5"),
        (generate_module, ["{run}", "--top_k", "0"], "--top_k: got 0"),
        (generate_module, ["{run}", "--num_samples", "0"], "--num_samples: got 0"),
        (generate_module, ["{run}", "--promt", "x"], "--prompt"),
        (generate_module, ["{run}", "--seed", "-1"], "--seed: got -1"),
        (generate_module, ["{run}", "--prompt", "\udcff"], "--prompt"),
        (evaluate_module, ["{run}", "--metrics", "bleu"], "bleu"),
        (evaluate_module, ["{run}", "--batch_size", "0"], "--batch_size: got 0"),
        (evaluate_module, ["{run}", "--data.path", "/no/such/file"], "/no/such/file"),
    ],
    ids=str,
)
def test_bad_calls_name_the_value(module: object, arguments: list[str], told: str, run: Path):
    with pytest.raises(InputError) as error:
        module.main([word.replace("{run}", str(run)) for word in arguments])  # type: ignore[attr-defined]
    assert told in str(error.value)


class TestSamples:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("return self._value + 1", True),
            ("    def f(self, *args):", True),
            ("# a comment, don't mind", True),
            ("x = 'unfinished", False),
            ("call(a, b", False),
            ("price = 3 $ 4", False),
        ],
    )
    def test_a_line_is_python_or_not(self, line: str, expected: bool):
        assert tokenizes(line.strip()) is expected

    def test_share(self):
        assert tokenizable_share(["a = 1\n\nb = (\n", "  c\n"]) == pytest.approx(2 / 3)
        assert tokenizable_share(["\n \n"]) is None

    def test_sections_after_the_checkpoint_are_dropped(self, tmp_path: Path):
        path = tmp_path / "samples.md"
        for step in (2, 4, 6):
            append_sample(path, Sample([f"text {step}\n```\ncode"], 0.5), step=step, tokens=step * 10)
        drop_samples_after(path, 4)
        text = path.read_text()
        assert "text 4" in text
        assert "text 6" not in text
        assert text.count("````") == 4, "the fence is longer than any inside"


def test_sampling_does_not_disturb_training_tensors():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from fastlm.generate import generate

    generate(model, [1], max_new_tokens=5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_log_shows_the_beginning_of_a_sample():
    assert opening("\n one\ntwo\n") == "one\ntwo"
    text = "\n".join(map(str, range(9)))
    assert opening(text).splitlines() == ["0", "1", "2", "3", "4", "5", "... 3 more lines in samples.md"]


def test_a_terminal_gets_no_control_characters():
    from fastlm.samples import printable

    assert printable("a\tb\nc\x1b[31m\x00") == "a\tb\nc\\x1b[31m\\x00"
