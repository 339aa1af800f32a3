"""The forms that the study compares, at two sizes: how each student is made of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BertModel, PreTrainedModel

from kron_kernels import KroneckerEmbedding, KroneckerLinear
from kroneckerbert import compress, plan
from kroneckerbert.modeling_kroneckerbert import kronecker_class

SIZES = ("8x", "21x")
PRESETS = {"8x": "kronecker-bert-8", "21x": "kronecker-bert-21"}  # the paper's, for BERT_BASE
Batches = Sequence[Mapping[str, Tensor]]
Make = Callable[[PreTrainedModel, Batches], PreTrainedModel]


class Student(NamedTuple):
    form: str
    size: str
    make: Make  # from the teacher and batches to calibrate on
    times: int = 1  # as many steps as the settings say
    after: tuple[str, str] | None = None  # form and size of the distilled student to start from
    rate_of: str | None = None  # the form whose rate is used; by default it is searched for


def by_weight(factors: str | Mapping[str, Any]) -> Make:
    return lambda teacher, batches: compress(teacher, factors)


def data_aware(factors: str | Mapping[str, Any]) -> Make:
    return lambda teacher, batches: compress(teacher, factors, calibration=batches, sequential=True)


def random_start(preset: str) -> Make:
    def make(teacher: PreTrainedModel, batches: Batches) -> PreTrainedModel:
        student = compress(teacher, preset)
        for module in student.modules():
            if isinstance(module, KroneckerLinear | KroneckerEmbedding):
                module.reset_parameters(std=0.02)
        return student

    return make


def product_plus_low_rank(preset: str) -> Make:
    """Words of low rank; linear layers: a product of half the parameters, low rank of the rest."""

    def make(teacher: PreTrainedModel, batches: Batches) -> PreTrainedModel:
        config_class = kronecker_class(teacher).config_class
        shapes = config_class.preset(f"{preset}+low-rank-words", teacher.config).kronecker_shapes()
        factors: dict[str, Any] = {}
        for path, (shape,) in shapes.items():
            rows, columns = shape.out_features, shape.in_features
            m1, n1 = shape.a_shape
            if shape.is_low_rank:
                factors[path] = {"a_shape": [rows, 1], "rank": shape.rank}
                continue
            m1 = 2 * m1 if m1 * n1 < (rows // m1) * (columns // n1) else m1 // 2
            left = shape.parameters - m1 * n1 - (rows // m1) * (columns // n1)
            low_rank = {"a_shape": [rows, 1], "rank": left // (rows + columns)}
            factors[path] = [{"a_shape": [m1, n1], "rank": 1}, low_rank]
        return compress(teacher, factors, calibration=batches, sequential=True)

    return make


def dense_layers(count: int, rank: int) -> Make:
    """The teacher's first layers, and words of low rank."""

    def make(teacher: PreTrainedModel, batches: Batches) -> PreTrainedModel:
        config = type(teacher.config).from_dict(
            teacher.config.to_dict() | {"num_hidden_layers": count}
        )
        shallow = BertModel(config).eval()
        shallow.load_state_dict(teacher.state_dict(), strict=False)
        return compress(
            shallow, {"word_embeddings": {"a_shape": [config.vocab_size, 1], "rank": rank}}
        )

    return make


def planned(preset: str) -> Make:
    """What ``plan`` chooses for the parameters of a preset, on four batches."""

    def make(teacher: PreTrainedModel, batches: Batches) -> PreTrainedModel:
        size = compress(teacher, preset).num_parameters()
        chosen = plan(
            teacher,
            {"parameters": size},
            calibration=batches[:4],
            keep_dense_if_slower=False,
            progress=True,
        )
        return compress(teacher, chosen, calibration=batches, sequential=True)

    return make


PAPER, WORDS, LOW_RANK = "products (the paper's)", "products, low-rank words", "low rank"
MIXED = "products in the feed-forward blocks, low rank elsewhere"
PLUS, PLANNED = "product plus low rank", "planned"
# One dense layer and words of this rank have the size of the 8x products; two have 1.5 times it.
# A single dense layer is larger than a whole 21x student.
DENSE = {"8x": {"one dense layer": (1, 32), "two dense layers (5x)": (2, 23)}, "21x": {}}


def students() -> list[Student]:
    """In the order in which they are trained: the two sizes of a form after each other."""
    found = []
    for size, preset in PRESETS.items():
        words, rank = f"{preset}+low-rank-words", f"{preset}+low-rank"
        makes = {
            PAPER + ", by weight": by_weight(preset),
            WORDS: data_aware(words),
            LOW_RANK: data_aware(rank),
            MIXED: data_aware(f"{words}+low-rank-attention"),
            PLUS: product_plus_low_rank(preset),
            PAPER: data_aware(preset),
            LOW_RANK + ", by weight": by_weight(rank),
            WORDS + ", random start": random_start(words),
        }
        makes |= {form: dense_layers(*args) for form, args in DENSE[size].items()}
        makes[PLANNED] = planned(preset)
        found.append([Student(form, size, make) for form, make in makes.items()])
    longest = max(map(len, found))
    rows = [row[i] for i in range(longest) for row in found if i < len(row)]
    again = {(student.form, student.size): student.make for student in rows}
    rows += [
        Student(f"{form}, 4 times the steps", size, again[form, size], times=4, rate_of=form)
        for form in (WORDS, LOW_RANK, PLANNED)
        for size in SIZES
    ]
    rows.append(Student(f"{WORDS}, by way of 8x", "21x", again[WORDS, "21x"], after=(WORDS, "8x")))
    return rows


def of_factors(teacher: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    """A student with a row's factors and layers, and random weights: to count and to time."""
    student_class = kronecker_class(teacher)
    shape = teacher.config.to_dict() | {"num_hidden_layers": config["layers"]}
    dense = type(teacher.config).from_dict(shape)
    made = student_class.config_class.from_dense(dense, config["factors"])
    torch.manual_seed(0)
    return student_class(made).eval()
