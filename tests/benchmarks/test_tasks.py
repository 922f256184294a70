"""The tasks of the quality experiments ask what they say."""

import pytest
import torch

from benchmarks.tasks import (
    AssociativeRecall,
    Parity,
    PermutationWords,
    SelectiveCopying,
)
from ten_dist.config.model import IGNORED_TARGET


@pytest.mark.parametrize("count", AssociativeRecall.counts)
def test_recall_asks_each_key_once_for_its_value(count):
    task = AssociativeRecall()
    inputs, targets = task.draw(5, count, torch.Generator().manual_seed(0))
    assert inputs.shape == (5, 16 * count)
    filler = task.vocab_size - 1
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        shown, rest = row[: 2 * count], row[2 * count :]
        value_of = dict(zip(shown[::2], shown[1::2]))
        assert len(value_of) == count
        # The answers are not to be seen behind the pairs.
        assert sorted(t for t in rest if t != filler) == sorted(value_of)
        asked = {row[i]: a for i, a in enumerate(answers) if a != IGNORED_TARGET}
        assert asked == value_of
        assert answers[: 2 * count] == [IGNORED_TARGET] * 2 * count


def test_recall_begins_with_few_pairs_and_has_as_many_tokens_in_every_batch():
    shapes = [tuple(x.shape) for x, _ in AssociativeRecall().batches(2, 40, seed=0)]
    assert set(shapes[:10]) == {(8, 64)}
    assert set(shapes[10:]) == {(8, 64), (4, 128), (2, 256)}


def test_recall_asks_soon_more_often_than_late():
    _, targets = AssociativeRecall().draw(500, 16, torch.Generator().manual_seed(0))
    asked = (targets != IGNORED_TARGET).double().mean(dim=0)[32:]
    assert asked[:32].sum() > 3 * asked[-32:].sum() > 0


def test_recall_asks_in_another_order_than_it_shows():
    task, places = AssociativeRecall(), []
    inputs, targets = task.draw(500, 4, torch.Generator().manual_seed(0))
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        asked = [row[i] for i, a in enumerate(answers) if a != IGNORED_TARGET]
        places.append(row[:8:2].index(asked[0]))
    assert min(places.count(place) for place in range(4)) > 80


def test_copying_asks_for_the_symbols_in_their_order():
    task = SelectiveCopying()
    inputs, targets = task.draw(5, 4, torch.Generator().manual_seed(0))
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        symbols = [token for token in row[: task.LENGTH] if token < task.SYMBOLS]
        assert len(symbols) == 4 and answers[task.LENGTH :] == symbols
        assert answers[: task.LENGTH] == [IGNORED_TARGET] * task.LENGTH


def test_parity_is_that_of_the_ones_so_far():
    inputs, targets = Parity().draw(4, 50, torch.Generator().manual_seed(0))
    assert torch.equal(targets, inputs.cumsum(dim=1) % 2)


@pytest.mark.parametrize(("degree", "order"), [(3, 6), (5, 120)])
def test_permutation_words_are_products_of_a_group(degree, order):
    task = PermutationWords(degree)
    assert task.vocab_size == order
    inputs, targets = task.draw(200, 40, torch.Generator().manual_seed(0))
    product = {}
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        assert row[0] == answers[0]
        for held, element, found in zip(answers, row[1:], answers[1:]):
            assert product.setdefault((held, element), found) == found
    # It depends on the order, and each element leads from each to another one.
    pairs = [(a, b) for a, b in product if (b, a) in product]
    assert any(product[a, b] != product[b, a] for a, b in pairs)
    for element in range(order):
        results = [found for (_, second), found in product.items() if second == element]
        assert len(results) == len(set(results))


@pytest.mark.parametrize("task", [Parity(), PermutationWords(3)])
def test_a_length_task_goes_to_sixteen_times_the_trained_length(task):
    assert next(iter(task.batches(2, 1, seed=0)))[0].shape == (2, 32)
    seen = []

    class Knowing(torch.nn.Module):
        def forward(self, inputs):
            seen.append(inputs.shape[1])
            product, found = torch.zeros(len(inputs), dtype=torch.int64), []
            for position in range(inputs.shape[1]):
                product = task.table[product, inputs[:, position]]
                found.append(product)
            return torch.nn.functional.one_hot(torch.stack(found, 1), task.vocab_size)

    figures = task.figures(Knowing())
    assert max(seen) == 16 * 32
    assert set(figures.values()) == {1.0}
