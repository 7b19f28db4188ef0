"""Batches visit everything, resume exactly, augment as documented and never consult the host."""

import pytest
import torch
import torch.nn.functional as F

from hybridflow.data import Batches, iterate
from hybridflow.errors import InputError

N = 12
IMAGES = torch.randint(1, 256, (N, 3, 6, 5), generator=torch.Generator().manual_seed(0)).byte()
INDEX = torch.arange(N)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def labels_of_epoch(batches):
    """The labels of all batches of a new epoch, one after the other."""
    batches.shuffle()
    return torch.cat([batches.next()[1] for _ in range(batches.steps_per_epoch)])


@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_an_epoch_visits_everything_once(batch_size):
    batches = Batches(IMAGES, INDEX, batch_size, device="cpu")
    assert batches.steps_per_epoch == N // batch_size
    for _ in range(3):
        assert torch.equal(labels_of_epoch(batches).sort().values, INDEX)


@pytest.mark.parametrize("batch_size", [5, 7, 11, 13, 12 * 3, 40])
def test_batches_wrap_around_in_the_same_order(batch_size):
    batches = Batches(IMAGES, INDEX, batch_size, device="cpu")
    assert batches.steps_per_epoch == -(-N // batch_size)
    visited = labels_of_epoch(batches)
    assert torch.equal(visited[:N].sort().values, INDEX)
    going_on = torch.cat([visited, batches.next()[1]])
    assert torch.equal(going_on, visited[:N].repeat(8)[: len(going_on)])


def test_epochs_differ_and_the_first_is_shuffled():
    batches = Batches(IMAGES, INDEX, N, device="cpu")
    first = batches.next()[1]
    assert not torch.equal(first, INDEX)
    assert not torch.equal(first, labels_of_epoch(batches))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_items_keep_their_type_and_belong_to_their_labels(dtype):
    x = IMAGES.to(dtype)
    batch, index = Batches(x, INDEX, 7, device="cpu").next()
    assert batch.dtype == dtype
    assert torch.equal(batch, x[index])


def test_points_without_labels():
    points = torch.randn(N, 2)
    batch, labels = Batches(points, None, 5, device="cpu").next()
    assert batch.shape == (5, 2) and batch.dtype == torch.float32
    assert labels is None


@pytest.mark.parametrize(("shift", "flip"), [(2, False), (0, True), (2, True), (7, False)])
def test_augmented_images_are_exact_shifts_and_mirror_images(shift, flip):
    """Each is one of the crops of the padded image, mirrored or not, and all of them occur."""
    variants = [IMAGES, IMAGES.flip(3)] if flip else [IMAGES]
    crops = [
        F.pad(variant, (shift, shift, shift, shift))[:, :, top : top + 6, left : left + 5]
        for variant in variants
        for top in range(2 * shift + 1)
        for left in range(2 * shift + 1)
    ]
    candidates = torch.stack(crops)
    batches = Batches(IMAGES, INDEX, 5000, shift=shift, flip=flip, device="cpu")
    x, index = batches.next()
    assert x.shape == (5000, 3, 6, 5) and x.dtype == torch.uint8
    occurred = torch.zeros(len(candidates), dtype=torch.bool)
    for i in range(N):
        matches = (x[index == i][:, None] == candidates[None, :, i]).flatten(2).all(2)
        assert matches.any(1).all()
        occurred |= matches.any(0)
    assert occurred.all()


def test_shifts_and_mirror_images_are_equally_frequent():
    """Of one dot in the middle all 5 x 5 places, and of one at the edge both edges."""
    dot = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    dot[..., 2, 2] = 1
    x, _ = Batches(dot, None, 25_000, shift=2, device="cpu").next()
    assert ((x.sum(dim=(0, 1)) - 1000).abs() < 150).all()
    edge = dot.roll(2, dims=3)
    x, _ = Batches(edge, None, 10_000, flip=True, device="cpu").next()
    assert abs(x[:, 0, 2, 0].sum() - 5000) < 250
    assert x[:, 0, 2, 0].sum() + x[:, 0, 2, 4].sum() == 10_000


def test_without_augmentation_no_random_numbers_are_drawn():
    batches = Batches(IMAGES, INDEX, 5, device="cpu")
    state = torch.get_rng_state()
    batches.next()
    assert torch.equal(torch.get_rng_state(), state)


def test_resuming_gives_the_same_batches():
    batches = Batches(IMAGES, INDEX, 5, shift=1, flip=True, device="cpu")
    for _ in range(3):
        batches.next()
    state, rng = batches.state_dict(), torch.get_rng_state()
    expected = [batches.next() for _ in range(4)] + [(None, labels_of_epoch(batches))]

    resumed = Batches(IMAGES, INDEX, 5, shift=1, flip=True, device="cpu")
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    for x, y in expected[:-1]:
        again_x, again_y = resumed.next()
        assert torch.equal(again_x, x) and torch.equal(again_y, y)
    assert torch.equal(labels_of_epoch(resumed), expected[-1][1])


def test_state_changes_in_place_only():
    """A captured graph holds the addresses of the permutation and the cursor."""
    batches = Batches(IMAGES, INDEX, 5, device="cpu")
    addresses = batches._order.data_ptr(), batches._cursor.data_ptr()
    state = batches.state_dict()
    saved = {key: value.clone() for key, value in state.items()}
    batches.next()
    batches.shuffle()
    assert all(torch.equal(state[key], saved[key]) for key in saved), "the state is a copy"
    batches.load_state_dict(state)
    batches.next()
    assert (batches._order.data_ptr(), batches._cursor.data_ptr()) == addresses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.arange(N + 1)}, "order has 13 items, want 12"),
        ({"order": torch.zeros(N, dtype=torch.int64)}, "not a permutation"),
        ({"cursor": torch.tensor(N)}, "the cursor lies outside"),
        ({"cursor": torch.tensor(-1)}, "the cursor lies outside"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    batches = Batches(IMAGES, INDEX, 5, device="cpu")
    before = batches.state_dict()
    with pytest.raises(InputError, match=message):
        batches.load_state_dict(before | change)
    after = batches.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_host_reads_nothing():
    """Tensors on the meta device have no values: reading one raises."""
    x, y = torch.empty(N, 3, 6, 5, device="meta"), torch.empty(N, device="meta")
    batches = Batches(x, y, 5, shift=2, flip=True, device="meta")
    for _ in range(4):
        images, labels = batches.next()
        assert images.shape == (5, 3, 6, 5) and labels.shape == (5,)
    batches.shuffle()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_draws_the_same_batches_as_eager_calls():
    batches = Batches(IMAGES, INDEX, 5, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            batches.next()
    torch.cuda.current_stream().wait_stream(side)
    state = batches.state_dict()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, y = batches.next()

    eager = Batches(IMAGES, INDEX, 5, device="cuda")
    for _ in range(2):
        batches.load_state_dict(state)
        eager.load_state_dict(state)
        for _ in range(7):
            graph.replay()
            expected_x, expected_y = eager.next()
            assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
        batches.shuffle()
        state = batches.state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_replay_of_a_captured_graph_augments_anew():
    batches = Batches(IMAGES[:1], None, 64, shift=2, flip=True, device="cuda")
    batches.next()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, _ = batches.next()
    graph.replay()
    first = x.clone()
    graph.replay()
    assert not torch.equal(first, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, want 1 or more"),
        ({"x": IMAGES[:0], "y": INDEX[:0]}, "x: got no items"),
        ({"y": INDEX[:3]}, "y: got 3 labels, want one for each of the 12 items"),
        ({"shift": -1}, "shift: got -1, want 0 or more pixels"),
        ({"x": torch.randn(N, 2), "shift": 1}, r"shape \(12, 2\); only images"),
        ({"x": torch.randn(N, 2), "flip": True}, r"shape \(12, 2\); only images"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Batches(**{"x": IMAGES, "y": INDEX, "batch_size": 4, "device": "cpu"} | arguments)


@pytest.mark.parametrize(("batch_size", "sizes"), [(5, [5, 5, 2]), (12, [12]), (50, [12])])
def test_iterate_goes_through_everything_in_order(batch_size, sizes):
    batches = list(iterate(IMAGES, INDEX, batch_size))
    assert [len(x) for x, _ in batches] == sizes
    assert torch.equal(torch.cat([x for x, _ in batches]), IMAGES)
    assert torch.equal(torch.cat([y for _, y in batches]), INDEX)


def test_iterate_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="y: got 11 labels"):
        iterate(IMAGES, INDEX[1:], 5)
    with pytest.raises(InputError, match="batch_size: got 0"):
        iterate(IMAGES, INDEX, 0)
