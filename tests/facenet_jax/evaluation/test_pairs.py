"""The LFW protocol against loops, against the original code's own output, and on bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facenet_jax.errors import BadInput
from facenet_jax.evaluation import pairs as p
from facenet_jax.evaluation.original import unstable_order
from tests.references import pairs as oracle


def random_pairs(seed, folds=4, per_fold=12, dimensions=5, noise=0.6, rounded=False):
    rng = np.random.default_rng(seed)
    same = np.tile(np.repeat([True, False], per_fold // 2), folds)
    first = rng.normal(size=(len(same), dimensions))
    second = np.where(same[:, None], first + noise * rng.normal(size=first.shape), rng.normal(size=first.shape))
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    first, second = unit(first), unit(second)
    return (
        (first.round(1), second.round(1), same, np.repeat(np.arange(folds), per_fold))
        if rounded
        else (first, second, same, np.repeat(np.arange(folds), per_fold))
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["squared", "cosine"]),
    mean=st.booleans(),
    far=st.sampled_from([0.0, 0.06, 0.2]),
    noise=st.sampled_from([0.3, 1.0]),
)
def test_equals_brute_force(seed, kind, mean, far, noise):
    first, second, same, fold = random_pairs(seed, noise=noise)
    found = p.verify(first, second, same, fold, distance=kind, mean_subtraction=mean, far_target=far)
    accuracies, vals, fars = oracle.protocol(first, second, same.tolist(), fold.tolist(), kind, mean, far)
    np.testing.assert_allclose(found.fold_accuracies, accuracies, atol=1e-9)
    assert found.val == pytest.approx(np.mean(vals), abs=1e-9)
    assert found.far == pytest.approx(np.mean(fars), abs=1e-9)
    assert found.accuracy_sem == pytest.approx(np.std(accuracies, ddof=1) / np.sqrt(4), abs=1e-12)


@pytest.mark.parametrize(("number", "distance"), [(0, "squared"), (1, "cosine")])
@pytest.mark.parametrize("mean", [False, True], ids=["raw", "mean"])
def test_original_mode_equals_the_original_code(shared, number, distance, mean):
    golden = np.load(shared / "golden" / "lfw_evaluate.npz", allow_pickle=False)
    first, second = golden["embeddings"][0::2], golden["embeddings"][1::2]
    fold = np.repeat(np.arange(10), 600)
    found = p.verify(first, second, golden["issame"], fold, distance=distance, mean_subtraction=mean, mode="original")
    key = f"m{number}_{'mean' if mean else 'raw'}_"
    np.testing.assert_allclose(found.fold_accuracies, golden[key + "accuracy"], atol=1e-12)
    for name, value in (("val", found.val), ("val_std", found.val_std), ("far", found.far)):
        assert value == pytest.approx(float(golden[key + name]), abs=1e-12)
    true, false = p.original_curves(first, second, golden["issame"], fold, distance=distance, mean_subtraction=mean)
    np.testing.assert_allclose(true, golden[key + "tpr"], atol=1e-12)
    np.testing.assert_allclose(false, golden[key + "fpr"], atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=200))
def test_unstable_order_sorts(values):
    order = unstable_order(values)
    assert sorted(order.tolist()) == list(range(len(values)))
    assert [values[i] for i in order] == sorted(values)


def test_perfect_and_useless_embeddings():
    first, second, same, fold = random_pairs(0, per_fold=40, noise=0.0)
    perfect = p.verify(first, second, same, fold)
    assert perfect.accuracy == 1 and perfect.val == 1 and perfect.auc == 1 and perfect.eer == 0
    useless = p.verify(np.ones_like(first), np.ones_like(first), same, fold)
    assert useless.accuracy == 0.5 and useless.auc == 0.5 and useless.eer == pytest.approx(0.5)


def test_missing_pairs_count_as_wrong_and_choose_nothing():
    first, second, same, fold = random_pairs(3, noise=0.0)
    present = np.ones(len(same), bool)
    present[[0, 20]] = False
    whole = p.verify(first, second, same, fold)
    first[[0, 20]] = 0
    found = p.verify(first, second, same, fold, present=present)
    assert found.missing == 2
    # Same pairs are equal here, so both pairs were right before; and no threshold moved, for neither was the nearest different pair.
    assert found.accuracy == pytest.approx(whole.accuracy - 2 / len(same))


def test_cosine_of_equal_and_zero_rows_is_no_nan():
    a = np.asarray([[1e-3, 3.0], [0, 0]], np.float32)
    assert p.distances(a, a, "cosine").tolist() == pytest.approx([0, 0.5], abs=1e-3)


def test_pairs_file(tmp_path, shared):
    path = tmp_path / "pairs.txt"
    path.write_text("2 1\nAda\t1\t2\nAda\t1\tBob\t3\nBob 1 3\nBob 2 Cy 10\n")
    found = p.read_pairs(path)
    assert found.first.tolist() == ["Ada/Ada_0001", "Ada/Ada_0001", "Bob/Bob_0001", "Bob/Bob_0002"]
    assert found.second.tolist() == ["Ada/Ada_0002", "Bob/Bob_0003", "Bob/Bob_0003", "Cy/Cy_0010"]
    assert found.same.tolist() == [True, False, True, False] and found.fold.tolist() == [0, 0, 1, 1]
    for text, words in (
        ("", "first line"),
        ("1 1\nAda 1 2\nAda 1 Bob 3\n", "at least 2 of 1"),
        ("10 0\n", "at least 2 of 1"),
        ("2 1\nAda 1 2\n", "promises 2 x 2 x 1"),
        ("2 1\nAda 1 2\nAda x Bob 3\n", "line 3"),
        ("2 1\nAda 1\nB 1 C 2\n", "line 2"),
        ("2 1\n\nAda 1 2 3 4\nB 1 C 2\n", "line 3"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=words):
            p.read_pairs(path)


def test_drawn_pairs_keep_people_in_their_fold():
    labels = np.repeat(np.arange(40), 3)
    keys = np.asarray([f"{label}/{i}" for i, label in enumerate(labels)])
    drawn = p.draw_pairs(keys, labels, folds=5, per_fold=10)
    assert len(drawn) == 100 and drawn.folds == 5
    assert len({frozenset(pair) for pair in zip(drawn.first.tolist(), drawn.second.tolist(), strict=True)}) == 100
    of = lambda key: key.split("/")[0]
    folds_of = {}
    for first, second, same, fold in zip(drawn.first, drawn.second, drawn.same, drawn.fold, strict=True):
        assert (of(first) == of(second)) == same and first != second
        for key in (first, second):
            assert folds_of.setdefault(of(key), fold) == fold
    with pytest.raises(BadInput, match="too few"):
        p.draw_pairs(keys[:6], labels[:6], folds=5)


def test_bad_input():
    first, second, same, fold = random_pairs(0)
    with pytest.raises(BadInput, match="squared, cosine"):
        p.verify(first, second, same, fold, distance="l1")
    with pytest.raises(BadInput, match="NaN"):
        p.verify(np.where(first > 0, np.nan, first), second, same, fold)
    with pytest.raises(BadInput, match="2 folds"):
        p.verify(first, second, same, np.zeros(len(same), int))
