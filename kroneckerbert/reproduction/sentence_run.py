"""A sentence encoder from one recipe: texts, initial student, distillation, int8, scores, card.

Output:

    texts/texts.txt            the sentences, one per line
    start/                     the student before training
    sentences/                 the student, in floating point
    int8/                      the student, in int8
    scores/scores.json         of the teacher and of both
    latency/latency.json
    student/                   int8/, with its card, its numbers and checksums
    recipe.yaml, results.json, curves/, cache/, training/ as of other recipes
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch.utils.data import Dataset

from kron_kernels.files import write_file
from kroneckerbert import measure
from kroneckerbert.data import TextDataset, read_lines, read_table
from kroneckerbert.distillation import DistillationTrainer
from kroneckerbert.distillation.pooling import pair_evaluator
from kroneckerbert.distillation.provenance import (
    MADE_OF,
    digest,
    identity,
    read_json,
    write_json,
)
from kroneckerbert.evaluation import evaluate
from kroneckerbert.files import replace_folder, write_checksums
from kroneckerbert.loading import load as load_model
from kroneckerbert.loading import load_encoder, without_weights
from kroneckerbert.quantization import quantize
from kroneckerbert.reproduction.card import model_card
from kroneckerbert.reproduction.sentences import read_sentences
from kroneckerbert.reproduction.steps import Steps, core_hours, settings_of
from kroneckerbert.students import ABOUT


class SentenceRun(Steps):
    """A recipe with ``sentences`` in one folder."""

    def run(self) -> dict[str, Any]:
        stage = self.recipe.sentences
        assert stage is not None
        self.stage = stage
        self._check()
        if self.data is None:
            raise ValueError("sentences.texts are files of the data folder: give --data DIR.")
        self.folder = Path(self.data)
        self.pairs = {name: read_table(self.folder / file) for name, file in stage.pairs.items()}
        self.watched = read_table(self.folder / stage.watch) if stage.watch else None
        texts = self._prepared()
        about = {"texts": identity(texts), "max_length": stage.max_length}
        start = self._start(about, lambda: self._rows(texts))
        student = self._distilled(start, texts)
        int8 = self._quantised(student)
        scores = self._scored(student, int8)
        latency = self._latency(self.recipe.latency, int8) if self.recipe.latency else None
        if self.is_main:
            self._summarise(student, int8, scores, latency)
        self.wait()
        return read_json(self.output / "results.json")

    def _prepared(self) -> Path:
        tables = [*self.pairs.values(), *([self.watched] if self.watched else [])]
        held_out = [text for table in tables for text in (*table.texts, *(table.texts_b or ()))]
        made_of = {
            "texts": {
                name: asdict(file) | {"digest": _digest(self.folder, name)}
                for name, file in self.stage.texts.items()
            },
            "held out": digest("\n".join(held_out).encode()),
        }

        def work(folder: Path, _: Path) -> None:
            texts = read_sentences(self.stage.texts, self.folder, held_out)
            (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
            self.print(f"  {len(texts):,} sentences")

        return self._step("texts", made_of, work, alone=True)

    def _rows(self, texts: Path) -> Dataset:
        lines = read_lines(texts / "texts.txt")
        return TextDataset(self.tokenizer, lines, max_length=self.stage.max_length)

    def _distilled(self, start: Path, texts: Path) -> Path:
        settings = settings_of(self.stage)
        for name in ("texts", "pairs", "watch"):
            del settings[name]
        made_of = {"start": identity(start), "texts": identity(texts), "sentences": settings}

        def work(folder: Path, training: Path) -> None:
            cache = str(self.output / "cache") if self.stage.cache_teacher else None
            args = self._arguments(self.stage, training, teacher_cache=cache)
            teacher, student = load_encoder(self.dense), load_encoder(start)
            trainer = DistillationTrainer(
                student,
                teacher,
                args,
                evaluator=pair_evaluator(self.watched, "pairs") if self.watched else None,
                train_dataset=self._rows(texts),
                processing_class=self.tokenizer,
            )
            self._train(trainer, folder)
            if self.is_main:
                self._save(trainer.model, folder)

        return self._step("sentences", made_of, work)

    def _quantised(self, student: Path) -> Path:
        def work(folder: Path, _: Path) -> None:
            self._save(quantize(load_model(student)), folder)

        return self._step("int8", {"student": identity(student)}, work, alone=True, renew=True)

    def _scored(self, student: Path, int8: Path) -> dict[str, Any]:
        models: dict[str, Any] = {"teacher": self.dense, "student": student, "int8": int8}

        def work(folder: Path, _: Path) -> None:
            scores = {}
            for name, source in models.items():
                model: Any = load_encoder(source)
                scores[name] = {
                    task: evaluate(model, self.tokenizer, table)["spearman"]
                    for task, table in self.pairs.items()
                }
            write_json(folder / "scores.json", scores)

        made_of = {
            "student": identity(student),
            "int8": identity(int8),
            "pairs": {name: _digest(self.folder, file) for name, file in self.stage.pairs.items()},
        }
        folder = self._step("scores", made_of, work, alone=True, renew=True)
        return read_json(folder / "scores.json")

    def _summarise(
        self, trained: Path, int8: Path, scores: dict[str, Any], latency: dict | None
    ) -> None:
        """Write the finished student's folder, the numbers and the curves."""
        teacher, student = without_weights(self.dense), load_model(int8)
        results: dict[str, Any] = {
            "teacher": self.recipe.teacher.rpartition(":")[2].partition("/")[0],
            "description": self.recipe.description,
            "parameters": {
                name: measure.parameters(model.base_model)
                for name, model in (("teacher", teacher), ("student", student))
            },
            "bytes": measure.bytes_on_disk(int8),
            "scores": scores,
            "latency": latency,
            "core_hours": core_hours(trained),
        }
        text = yaml.safe_dump(self.recipe.given, sort_keys=False, allow_unicode=True)
        write_file(self.output / "recipe.yaml", text)
        write_json(self.output / "results.json", results)
        card = model_card(
            student,
            name=self.recipe.description.partition(";")[0] or "A sentence encoder",
            dense_parameters=results["parameters"]["teacher"],
            recipe=self.recipe.given,
            latency=latency,
            vectors=scores,
            core_hours={"sentences": results["core_hours"]},
        )
        with replace_folder(self.output / "student") as folder:
            shutil.copytree(
                int8, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MADE_OF, ".*")
            )
            write_file(folder / "README.md", str(card))
            write_json(folder / ABOUT, results)
            write_checksums(folder)
        self._save_curves({"sentences": {"sentences": trained}})
        for name, row in scores.items():
            self.print(f"  {name}: {', '.join(f'{of} {value:.4f}' for of, value in row.items())}")
        self.print(f"The student, with its card, is in {self.output / 'student'}.")


def _digest(folder: Path, name: str) -> str:
    return digest((folder / name).read_bytes())
