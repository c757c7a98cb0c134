"""The pictures of a run: what is in a frame, and that the files show it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from scipy import ndimage

from experiments import pictures

SHAPES = {
    'lenet5': {
        'Conv_0': (5, 5, 1, 20),
        'Conv_1': (5, 5, 20, 50),
        'Dense_0': (800, 500),
        'Dense_1': (500, 10),
    },
    'lenet300': {'Dense_0': (784, 300), 'Dense_1': (300, 100), 'Dense_2': (100, 10)},
}
THRESHOLD = 3.0


def make_params(network: str, progress: float = 0.5, variational: bool = True) -> dict:
    """Random weights of which more and more are noise as `progress` goes from 0 to 1."""
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in SHAPES[network].items():
        kernel = rng.normal(size=shape).astype(np.float32)
        params[name] = {'kernel': kernel, 'bias': np.zeros(shape[-1], np.float32)}
        if variational:
            log_sigma2 = rng.normal(-10 + 13 * progress, 1.5, shape)
            params[name]['log_sigma2'] = log_sigma2.astype(np.float32)
    return params


def make_history(epochs: int, variational: bool = True) -> list[dict]:
    history = []
    for epoch in range(1, epochs + 1):
        row = {
            'epoch': epoch,
            'loss': 1 / epoch,
            'data_term': 0.5 / epoch,
            'learning_rate': 1e-3,
            'train_error': 0.0,
            'test_error': 5 / epoch,
            'compression': 1.0,
            'sparsity_per_layer': {'Dense_0': 0.0},
        }
        if variational:
            row |= {'kl': 1e4, 'kl_weight': (epoch - 1) / epochs, 'compression': float(epoch)}
            row['sparsity_per_layer'] = {'Dense_0': 99.0 - 1 / epoch, 'Dense_1': 90.0}
        history.append(row)
    return history


def make_frames(network: str, n: int, variational: bool = True) -> list:
    steps = enumerate(np.linspace(0, 1, n), start=1)
    return [
        (epoch, pictures.snapshot(make_params(network, progress, variational), THRESHOLD))
        for epoch, progress in steps
    ]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB')).astype(int)


def saturation(image: np.ndarray) -> np.ndarray:
    """How far pixels are from grey: weights are coloured, all else is white, grey or black."""
    return image.max(axis=-1) - image.min(axis=-1)


def coloured(image: np.ndarray) -> float:
    return float(np.mean(saturation(image) > 8))


# Frames


@pytest.mark.parametrize(
    ('network', 'dense'),
    [('lenet5', np.s_[350:450, 200:300]), ('lenet300', np.s_[342:442, 100:200])],
)
def test_snapshot_is_zero_exactly_where_log_alpha_reaches_the_threshold(network, dense):
    params = make_params(network)
    frame = pictures.snapshot(params, THRESHOLD)
    dropped = {
        name: layer['log_sigma2'].astype(float) - np.log(layer['kernel'].astype(float) ** 2)
        >= THRESHOLD
        for name, layer in params.items()
    }
    first = next(iter(SHAPES[network]))
    assert 0.01 < np.mean(dropped[first]) < 0.99
    np.testing.assert_array_equal(frame['first'] == 0, dropped[first])
    np.testing.assert_array_equal(frame['dense'] == 0, dropped['Dense_0'][dense])
    kernel = np.where(dropped['Dense_0'], 0, params['Dense_0']['kernel'])
    np.testing.assert_allclose(frame['dense'], kernel[dense], rtol=1e-3)
    total = sum(mask.size for mask in dropped.values())
    assert frame['kept'].tolist() == [total - sum(map(np.sum, dropped.values())), total]


def test_a_weight_at_the_threshold_is_dropped_and_zeros_are_no_trouble():
    # As in the library: a tiny weight is judged by its own size, not by that of a guard.
    kernel = np.array([[1.0, 1.0, 0.0, 1e-6]], np.float32)
    log_sigma2 = np.array([[3.0, 2.999, -10.0, -26.0]], np.float32)
    params = {'Dense_0': {'kernel': kernel, 'log_sigma2': log_sigma2}}
    with np.errstate(all='raise', under='ignore'):
        frame = pictures.snapshot(params, THRESHOLD)
    assert (frame['first'] != 0).tolist() == [[False, True, False, True]]


def test_the_first_layer_is_the_first_in_natural_order_and_convolutions_come_first():
    def conv(value):
        return {'kernel': np.full((3, 3, 1, 2), value)}

    dense = {'kernel': np.full((4, 4), 9.0)}
    params = {'Adapter_0': dense, 'body': {'Conv_10': conv(10.0), 'Conv_2': conv(2.0)}}
    frame = pictures.snapshot(params, THRESHOLD)
    assert frame['first'].shape == (3, 3, 1, 2)
    assert np.all(frame['first'] == 2)
    assert np.all(frame['dense'] == 9)


def test_frames_come_back_in_order_without_later_and_unreadable_ones(tmp_path):
    frames = make_frames('lenet5', 4)
    for epoch in (12, 2, 3, 1):
        pictures.save_frame(tmp_path, epoch, frames[min(epoch, 4) - 1][1])
    truncated = sorted(tmp_path.iterdir())[2]  # epoch 3, as a killed run may leave it
    truncated.write_bytes(truncated.read_bytes()[:-200])
    (tmp_path / '00004.npz').write_bytes(b'')
    (tmp_path / '00005.tmp').write_bytes(b'PK')
    assert len(list(tmp_path.iterdir())) == 6  # no temporary file is left behind

    loaded = pictures.load_frames(tmp_path)
    assert [epoch for epoch, _ in loaded] == [1, 2, 12]
    for key, value in frames[1][1].items():
        np.testing.assert_array_equal(loaded[1][1][key], value)
    assert [epoch for epoch, _ in pictures.load_frames(tmp_path, last_epoch=2)] == [1, 2]
    assert pictures.load_frames(tmp_path / 'nothing') == []


def test_a_damaged_frame_is_skipped_wherever_the_damage_is(tmp_path):
    pictures.save_frame(tmp_path, 1, make_frames('lenet5', 1)[0][1])
    path = tmp_path / '00001.npz'
    whole = path.read_bytes()
    for position in range(40, len(whole), len(whole) // 7):
        path.write_bytes(whole[:position] + bytes(60) + whole[position + 60 :])
        assert len(pictures.load_frames(tmp_path)) <= 1  # and raises nothing


# Pictures


@pytest.mark.parametrize('network', SHAPES)
@pytest.mark.parametrize('variational', [True, False])
def test_all_pictures_of_a_run(tmp_path, network, variational):
    params = make_params(network, 1.0, variational)
    frames = make_frames(network, 3, variational)
    pictures.write_all(tmp_path, params, make_history(3, variational), THRESHOLD, frames)
    names = {'curves.png', 'weights.png', 'weights.gif'}
    if variational:
        names.add('log_alpha.png')
    assert {path.name for path in (tmp_path / 'pictures').iterdir()} == names
    for name in names:
        image = pixels(tmp_path / 'pictures' / name)
        assert min(image.shape[:2]) > 300
        assert coloured(image) > 0.001


def test_a_run_of_one_epoch_whose_frame_was_lost(tmp_path):
    params = make_params('lenet5', 1.0)
    pictures.write_all(tmp_path, params, make_history(1), THRESHOLD, frames=[])
    assert coloured(pixels(tmp_path / 'pictures' / 'curves.png')) > 0.0003  # markers show
    with Image.open(tmp_path / 'pictures' / 'weights.gif') as image:
        assert getattr(image, 'n_frames', 1) == 1


def test_curves_of_a_run_that_diverged_or_dropped_everything(tmp_path):
    history = make_history(4)
    history[2] |= {'loss': np.nan, 'data_term': np.inf, 'test_error': 90.2}
    history[3] |= {'compression': float('inf'), 'loss': np.nan, 'data_term': np.nan}
    pictures.training_curves(history, tmp_path / 'curves.png')
    assert pixels(tmp_path / 'curves.png').shape == (990, 1500, 3)


def test_histogram_colours_follow_the_threshold(tmp_path):
    # Blue bars are kept weights and orange ones dropped: with no weight beyond the threshold there
    # is no orange, and the other way around. A kernel of zeros is dropped, not an error.
    rng = np.random.default_rng(0)
    kept = {'kernel': np.ones((50, 40)), 'log_sigma2': rng.normal(-5, 1, (50, 40))}
    dropped = {'kernel': np.zeros((50, 40)), 'log_sigma2': rng.normal(-5, 1, (50, 40))}
    for name, layer in {'kept': kept, 'dropped': dropped}.items():
        pictures.log_alpha_histogram({'Dense_0': layer}, THRESHOLD, tmp_path / f'{name}.png')
        image = pixels(tmp_path / f'{name}.png')
        bluer = np.mean(image[..., 2] > image[..., 0] + 100)
        oranger = np.mean(image[..., 0] > image[..., 2] + 100)
        shown, absent = (bluer, oranger) if name == 'kept' else (oranger, bluer)
        assert shown > 0.001
        assert absent == 0


def test_weights_turn_white_where_they_are_dropped(tmp_path):
    frames = make_frames('lenet5', 2)
    pictures.weights(frames[0][1], frames[1][1], tmp_path / 'weights.png')
    image = pixels(tmp_path / 'weights.png')
    before, after = np.split(image[:, : image.shape[1] // 2 * 2], 2, axis=1)
    assert coloured(before) > 1.5 * coloured(after)


def test_only_zero_is_white_however_small_a_weight_is():
    values = np.array([[0.0, 1e-7, -1e-7, 1.0, -5.0, np.nan]])
    indices = pictures._indices(pictures._Panel('', values), limit=1.0)
    colours = pictures.PALETTE[indices][0].astype(int)
    assert colours[0].tolist() == [255, 255, 255]
    assert colours[1, 0] > colours[1, 2] + 8  # reddish
    assert colours[2, 2] > colours[2, 0] + 8  # bluish
    assert saturation(colours)[5] == 0  # a gap is grey
    assert colours[5, 0] < 240


def test_the_gif_shows_the_dense_piece_of_each_epoch(tmp_path):
    frames = make_frames('lenet5', 3)
    pictures.animate(frames, tmp_path / 'weights.gif')
    with Image.open(tmp_path / 'weights.gif') as image:
        shown = [np.asarray(f.convert('RGB')).astype(int) for f in ImageSequence.Iterator(image)]
    assert len(shown) == 3
    for (_, frame), picture in zip(frames, shown, strict=True):
        # The piece stands at the lower right, inside a margin of 20 and a border of 1 pixel, and
        # each of its weights is a square of 4 x 4 pixels.
        piece = picture[-421:-21, -421:-21].reshape(100, 4, 100, 4, 3)
        assert np.all(piece == piece[:, :1, :, :1])
        np.testing.assert_array_equal(
            np.all(piece[:, 0, :, 0] == 255, axis=-1), frame['dense'] == 0
        )


def test_a_long_gif_is_thinned_out_and_holds_its_last_frame(tmp_path):
    early, late = make_frames('lenet5', 2)
    frames = [(epoch, early[1]) for epoch in range(1, 200)] + [(200, late[1])]
    pictures.animate(frames, tmp_path / 'weights.gif')
    pictures.animate([frames[-1]], tmp_path / 'last.gif')
    with Image.open(tmp_path / 'weights.gif') as image:
        assert image.n_frames == 60
        first = image.info['duration']
        image.seek(59)
        assert image.info['duration'] > 10 * first
        last = np.asarray(image.convert('RGB')).astype(int)
    panels = np.s_[80:]  # below the title and the captions
    np.testing.assert_array_equal(
        saturation(last)[panels] > 8, saturation(pixels(tmp_path / 'last.gif'))[panels] > 8
    )


def test_a_gif_that_would_be_large_has_fewer_frames(tmp_path, monkeypatch):
    frames, path = make_frames('lenet300', 6), tmp_path / 'weights.gif'
    pictures.animate(frames, path)
    with Image.open(path) as image:
        image.seek(5)
        last = image.convert('RGB')
    monkeypatch.setattr(pictures, 'GIF_BYTES', path.stat().st_size - 1)
    pictures.animate(frames, path)
    assert path.stat().st_size <= pictures.GIF_BYTES
    with Image.open(path) as image:
        assert image.n_frames == 3
        image.seek(2)
        np.testing.assert_array_equal(image.convert('RGB'), last)


def test_every_unit_is_a_square_coloured_where_it_is_left(tmp_path):
    left = {
        'Conv_0 outputs': np.arange(6) % 2 == 0, 'Dense_0 inputs': np.arange(35) < 10,
        'one': np.ones(1, bool), 'none': np.zeros(7, bool), 'another row': np.ones(4, bool),
    }  # fmt: skip
    pictures.units(left, tmp_path / 'units.png')
    image = pixels(tmp_path / 'units.png')
    blue = np.all(np.abs(image - (0, 0x72, 0xB2)) < 3, axis=-1)
    pale = np.all(np.abs(image - 230) < 3, axis=-1)
    kept, gone = (
        sum(int(np.sum(k == is_left)) for k in left.values()) for is_left in (True, False)
    )
    for squares, wanted in ((blue, kept), (pale, gone)):
        labels, _ = ndimage.label(squares)
        areas = np.bincount(labels.ravel())[1:]
        assert np.sum(areas > 100) == wanted  # smaller ones are the borders of letters
