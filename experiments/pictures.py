"""Pictures of a training run: curves, histograms of log alpha, and weights getting sparse.

Everything here is NumPy, Matplotlib (without pyplot: no global state) and Pillow. Parameters come
in as nested dicts of arrays in which a layer is a dict with a 'kernel' and, where the layer is
variational, a 'log_sigma2' of the same shape:

    {'Conv_0': {'kernel': (5, 5, 1, 20), 'log_sigma2': (5, 5, 1, 20), 'bias': (20,)}, ...}

A *frame* is the little of the parameters that the weight pictures need, taken once an epoch; see
`snapshot`.
"""

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont

from svd_jax.math import log_alpha

Frame = dict[str, np.ndarray]
History = Sequence[Mapping[str, Any]]

# Okabe & Ito's palette, which stays readable with any colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00'
)  # fmt: skip
GREY = '#767676'
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY)

TIMES = '\N{MULTIPLICATION SIGN}'

PIECE = 100  # the largest side of the piece of a dense layer that is shown

GIF_FRAMES = 60
GIF_BYTES = 3_000_000
GIF_PANEL = 400  # the height of the panels of the GIF, in pixels, roughly

# One small palette for all pictures of weights: blues, white and reds for weights, white to purple
# for counts of weights, black to white for text. White is for exact zeros only: the palest tints
# are visible, so that a small weight is not taken for a dropped one. Few colours also keep the
# GIFs small.
LEVELS = 20


def _colours(name: str, positions: np.ndarray, white: int) -> np.ndarray:
    """Colours (positions, 3) uint8 of a colour map, one of which is made purely white."""
    colours = matplotlib.colormaps[name](positions, bytes=True)[:, :3]
    colours[white] = 255
    return colours


_TINTS = np.linspace(0.07, 0.5, LEVELS)
_SIGNED = _colours('RdBu_r', 0.5 + np.concatenate([-_TINTS[::-1], [0], _TINTS]), white=LEVELS)
_COUNTS = _colours('Purples', np.concatenate([[0], np.linspace(0.15, 0.9, LEVELS)]), white=0)
_GREYS = _colours('gray', np.linspace(0, 1, LEVELS), white=-1)
PALETTE = np.concatenate([_SIGNED, _COUNTS, _GREYS])  # (colours, 3), uint8
NO_COUNT = len(_SIGNED)
BLACK = NO_COUNT + len(_COUNTS)
WHITE = len(PALETTE) - 1
GAP = WHITE - 3  # a light grey


# The parameters


def _layers(params: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The layers of a nested tree by name: convolutions first, then in natural order."""

    def walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Mapping]]:
        if 'kernel' in tree:
            yield '/'.join(path), tree
        for name, subtree in tree.items():
            if isinstance(subtree, Mapping):
                yield from walk(subtree, (*path, name))

    def order(item: tuple[str, Mapping]) -> tuple:
        name, layer = item
        parts = re.split(r'(\d+)', name)  # text and digits alternate: Conv_2 before Conv_10
        natural = [int(part) if part.isdecimal() else part for part in parts]
        return np.ndim(layer['kernel']) <= 2, natural

    return dict(sorted(walk(params, ()), key=order))


def _log_alpha(layer: Mapping[str, Any]) -> np.ndarray:
    """log alpha of each weight of a variational layer, in the shape of its kernel, all finite."""
    return np.asarray(log_alpha(layer['kernel'], layer['log_sigma2']))


def _sparse_kernel(layer: Mapping[str, Any], threshold: float) -> np.ndarray:
    """The kernel with zeros where log alpha reaches the threshold; as it is in a plain layer."""
    kernel = np.asarray(layer['kernel'])
    if 'log_sigma2' not in layer:
        return kernel
    return np.where(_log_alpha(layer) >= threshold, 0, kernel)


# The frames


def snapshot(params: Mapping[str, Any], threshold: float) -> Frame:
    """What the weight pictures need of the parameters, with dropped weights set to zero.

    Returns:
        'first': the first layer's kernel, (height, width, inputs, outputs) or (inputs, outputs).
        'dense': the central piece, up to 100 x 100, of the largest dense layer. It is central
            because the first inputs belong to the border of the image, which is soon dropped.
        'kept': (2,), how many weights the whole network keeps, and how many it has.
    """
    kernels = [_sparse_kernel(layer, threshold) for layer in _layers(params).values()]
    if not kernels:
        raise ValueError('no layer with a kernel in the parameters')
    frame = {
        'first': kernels[0].astype(np.float16),
        'kept': np.array([sum(map(np.count_nonzero, kernels)), sum(k.size for k in kernels)]),
    }
    matrices = [kernel for kernel in kernels if kernel.ndim == 2]
    if matrices:
        largest = max(matrices, key=np.size)
        rows, columns = (slice(max(0, n - PIECE) // 2, (n + PIECE) // 2) for n in largest.shape)
        frame['dense'] = largest[rows, columns].astype(np.float16)
    return frame


def save_frame(directory: Path, epoch: int, frame: Frame) -> None:
    """Writes the frame of one epoch, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f'{epoch:05d}.npz'
    temporary = path.with_suffix('.tmp')
    with temporary.open('wb') as file:
        np.savez_compressed(file, allow_pickle=False, **frame)
    temporary.replace(path)


def load_frames(directory: Path, last_epoch: int | None = None) -> list[tuple[int, Frame]]:
    """The frames of a run in the order of epochs, up to `last_epoch` if one is given.

    A run that was killed may have left a frame that cannot be read: such frames are skipped.
    """
    frames = []
    for path in directory.glob('*.npz'):
        if not path.stem.isdecimal() or (last_epoch is not None and int(path.stem) > last_epoch):
            continue
        try:
            with path.open('rb') as opened, np.load(opened, allow_pickle=False) as file:
                frames.append((int(path.stem), dict(file)))
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            continue
    return sorted(frames, key=lambda item: item[0])


# The curves and the histograms


def _figure(width: float, height: float, compress: bool = False) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, compress=compress)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, title: str = '', xlabel: str = '', ylabel: str = '') -> None:
    """Title and labels as all pictures here have them."""
    axes.set_title(title, loc='left', fontsize=10.5, fontweight='bold')
    axes.set_xlabel(xlabel, fontsize=9.5)
    axes.set_ylabel(ylabel, fontsize=9.5)
    axes.tick_params(labelsize=9)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='0.9', linewidth=0.8)
    axes.set_axisbelow(True)


def _log_ticks(axes: Axes, suffix: str = '') -> None:
    """A logarithmic y axis with few, plain numbers."""
    axes.set_yscale('log', nonpositive='mask')
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}{suffix}'))
    axes.yaxis.set_minor_locator(NullLocator())


def training_curves(history: History, path: Path) -> None:
    """Error and loss over the epochs and, for a variational run, compression and sparsity."""
    variational = any('kl' in row for row in history)
    epochs = np.array([row['epoch'] for row in history])
    marker = '.' if len(epochs) <= 40 else None  # a lone epoch has no line to be seen by

    def column(key: str) -> np.ndarray:
        return np.array([row.get(key, np.nan) for row in history], float)

    figure = _figure(10, 6.6 if variational else 3.5)
    panels = figure.subplots(2 if variational else 1, 2, squeeze=False).flat

    def draw(
        axes: Axes, values: np.ndarray, label: str, color: str, style: str = '-', width: float = 1.8
    ) -> None:
        axes.plot(epochs, values, style, color=color, label=label, marker=marker, linewidth=width)

    error = next(panels)
    train, test = map(column, ('train_error', 'test_error'))
    draw(error, train, 'train', ORANGE, '--')
    draw(error, test, 'test', BLUE)
    style(error, f'Test error: {test[-1]:.2f}%', 'epoch', 'error, %')
    # The first epochs may be many times worse than the rest; they run out of the panel.
    worst = np.nanmax([train, test])
    error.set_ylim(0, max(1.1 * min(worst, 4 * np.nanmedian(test)), 0.1))

    if variational:
        compression, axes = column('compression'), next(panels)
        draw(axes, compression, 'compression', BLUE)
        style(axes, f'Compression: {compression[-1]:.3g}{TIMES}', 'epoch', 'weights / weights kept')
        largest = np.max(compression, where=np.isfinite(compression), initial=1)
        axes.set_ylim(0.9, max(10, 1.5 * largest))
        _log_ticks(axes, TIMES)

        axes = next(panels)
        per_layer = [row.get('sparsity_per_layer', {}) for row in history]
        names = list(dict.fromkeys(name for row in per_layer for name in row))
        for i, name in enumerate(names):
            sparsity = np.array([row.get(name, np.nan) for row in per_layer], float)
            again, color = divmod(i, len(COLOURS))
            dashes = ('-', '--', ':')[again % 3]
            draw(axes, sparsity, f'{name}: {sparsity[-1]:.1f}%', COLOURS[color], dashes)
        style(axes, 'Sparsity of each layer', 'epoch', 'weights dropped, %')
        axes.set_ylim(-3, 103)

    axes = next(panels)
    loss, data = column('loss'), column('data_term')
    if variational:
        # By subtraction the KL term is in the units of the loss, whatever the row's 'kl' is in.
        kl = np.where(column('kl_weight') > 0, loss - data, np.nan)
        draw(axes, loss, 'loss, the sum', '0.8', width=5)  # wide: it often runs under its terms
        draw(axes, data, 'data term', BLUE)
        draw(axes, kl, 'KL term', ORANGE)
    else:
        draw(axes, loss, 'loss', BLUE)
    style(axes, 'Training loss', 'epoch', 'nats')
    _log_ticks(axes)

    for axes in figure.axes:
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(
            MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
        if len(axes.lines) > 1:
            many = len(axes.lines) > len(COLOURS)
            axes.legend(
                fontsize=6.5 if many else 8.5, ncols=2 if many else 1, framealpha=0.85,
                edgecolor='none',
            )  # fmt: skip
    figure.align_ylabels()
    figure.savefig(path)


def log_alpha_histogram(params: Mapping[str, Any], threshold: float, path: Path) -> None:
    """A histogram of log alpha for each variational layer, with the weights that are dropped."""
    layers = {name: layer for name, layer in _layers(params).items() if 'log_sigma2' in layer}
    log_alphas = {name: _log_alpha(layer) for name, layer in layers.items()}
    if not log_alphas:
        raise ValueError('no layer with log_sigma2 in the parameters')

    # The threshold is the edge of a bin, so each bin is either kept or dropped. The few weights
    # outside the range (a weight that is exactly zero, say) count in the bins at its ends.
    width, farthest = 0.25, 15.0
    quantiles = np.stack([np.quantile(values, (0.001, 0.999)) for values in log_alphas.values()])
    below = math.ceil(np.clip(threshold - quantiles.min(), 1, farthest) / width)
    above = math.ceil(np.clip(quantiles.max() - threshold, 1, farthest) / width)
    edges = threshold + width * np.arange(-below, above + 1)
    centres = (edges[:-1] + edges[1:]) / 2

    figure = _figure(7.5, 0.6 + 1.45 * len(log_alphas))
    panels = figure.subplots(len(log_alphas), 1, sharex=True, squeeze=False).flat
    for axes, (name, values) in zip(panels, log_alphas.items(), strict=True):
        index = np.floor((values - threshold) / width).astype(int).clip(-below, above - 1) + below
        counts = np.bincount(index.ravel(), minlength=len(centres))
        axes.bar(centres, counts, width, color=np.where(centres < threshold, BLUE, ORANGE))
        axes.axvline(threshold, color='0.15', linewidth=1.2, linestyle='--')
        axes.set_yscale('log')  # the kept weights would not show beside the dropped ones
        axes.set_ylim(0.7, 3 * counts.max())
        axes.yaxis.set_minor_locator(NullLocator())
        shape = TIMES.join(map(str, values.shape))
        dropped = 100 * np.mean(values >= threshold)
        style(axes, f'{name} ({shape}): {dropped:.1f}% dropped', ylabel='weights')
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set_xlabel(
        rf'$\log\,\alpha$   (blue: kept, orange: dropped, dashed: threshold {threshold:g}; '
        'the outermost bars hold what lies beyond)',
        fontsize=9.5,
    )
    figure.align_ylabels()
    figure.savefig(path)


# The weights


class _Panel(NamedTuple):
    """One image of a frame: weights (signed), or counts of weights."""

    title: str
    values: np.ndarray  # (rows, columns), NaN in the gaps between filters
    largest_count: int | None = None


def _montage(images: np.ndarray) -> np.ndarray:
    """Images (n, height, width) in a near-square grid with gaps of one pixel."""
    n, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    tiles = np.full((rows * columns, height + 1, width + 1), np.nan, np.float32)
    tiles[:n, 1:, 1:] = images
    tiles = tiles.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2)
    grid = tiles.reshape(rows * (height + 1), columns * (width + 1))
    return np.pad(grid, ((0, 1), (0, 1)), constant_values=np.nan)


def _panels(frame: Frame) -> list[_Panel]:
    """The images of a frame, in which a unit on top of a square image is an image as well."""
    first = frame['first'].astype(np.float32)
    side = math.isqrt(first.shape[0])
    panels = []
    if first.ndim == 4 or (first.ndim == 2 and side > 1 and side**2 == first.shape[0]):
        if first.ndim == 4:
            images = first.reshape(*first.shape[:2], -1).transpose(2, 0, 1)
            kind = 'filters'
        else:
            images = first.T.reshape(-1, side, side)
            kind = 'units'
        n, height, width = images.shape
        shown = min(n, max(1, 150 // (max(height, width) + 1)) ** 2)  # what is still legible
        some = np.linspace(0, n - 1, shown).round().astype(int)
        number = f'{n}' if shown == n else f'{shown} of {n}'
        title = f'First layer: {number} {kind}, {height}{TIMES}{width}'
        panels.append(_Panel(title, _montage(images[some])))
        if kind == 'units':
            kept = np.count_nonzero(images, axis=0)
            panels.append(_Panel('First layer: weights kept per pixel', kept, n))
    else:
        matrix = first.reshape(-1, first.shape[-1])
        panels.append(_Panel('First layer', matrix[:PIECE, :PIECE]))
    if 'dense' in frame:
        rows, columns = frame['dense'].shape
        title = f'Largest dense layer: {rows}{TIMES}{columns} piece'
        panels.append(_Panel(title, frame['dense'].astype(np.float32)))
    return panels


def _panels_of(frames: Sequence[Frame]) -> list[list[_Panel]]:
    """The images of several frames, without counts of kept weights if none is ever dropped."""
    sparse = any(frame['kept'][0] < frame['kept'][1] for frame in frames)
    return [
        [panel for panel in _panels(frame) if sparse or panel.largest_count is None]
        for frame in frames
    ]


def _limit(panels: Sequence[_Panel]) -> float:
    """The weight that gets the darkest colour in panels that share their colours."""
    limits = []
    for panel in panels:
        sizes = np.abs(panel.values[np.isfinite(panel.values) & (panel.values != 0)])
        if sizes.size:
            limits.append(float(np.quantile(sizes, 0.99)))  # not the maximum: a lone outlier
    return max(limits, default=1.0)


def _indices(panel: _Panel, limit: float) -> np.ndarray:
    """The panel as indices into `PALETTE`, (rows, columns) uint8.

    Both kinds of values are rounded away from zero: only what is exactly zero is white.
    """
    if panel.largest_count is not None:
        shade = np.log1p(panel.values) / np.log1p(panel.largest_count)
        return (NO_COUNT + np.ceil(shade * LEVELS)).astype(np.uint8)
    level = np.ceil(np.abs(panel.values) / limit * LEVELS).clip(0, LEVELS)
    signed = LEVELS + np.sign(panel.values) * level
    return np.where(np.isnan(signed), GAP, np.nan_to_num(signed)).astype(np.uint8)


def _amount(frame: Frame) -> str:
    kept, total = map(int, frame['kept'])
    if kept == total:
        return f'all {total:,} weights'
    return f'{kept:,} of {total:,} weights ({min(100 * kept / total, 99.9):.3g}%)'


def weights(before: Frame, after: Frame, path: Path) -> None:
    """The first layer and a piece of the largest dense layer, before and after; zero is white."""
    rows = list(zip(*_panels_of([before, after]), strict=True))
    shapes = [row[0].values.shape for row in rows]
    heights = [height / width for height, width in shapes]  # of images of the same width
    figure = _figure(9, 1 + 3.9 * sum(heights), compress=True)
    grid = figure.subplots(len(rows), 2, squeeze=False, height_ratios=heights)
    for axes_row, row in zip(grid, rows, strict=True):
        largest_count, limit = row[0].largest_count, _limit(row)
        for axes, panel in zip(axes_row, row, strict=True):
            axes.imshow(PALETTE[_indices(panel, limit)], interpolation='nearest')
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color('0.75')
        axes_row[0].set_ylabel(row[0].title.replace(': ', '\n'), fontsize=10)
        if largest_count is None:
            norm, cmap, label = Normalize(-limit, limit), ListedColormap(_SIGNED / 255), 'weight'
        else:
            norm = FuncNorm((np.log1p, np.expm1), 0, largest_count)
            cmap, label = ListedColormap(_COUNTS / 255), 'weights kept'
        bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes_row, shrink=0.85, aspect=24)
        if largest_count is not None:
            ticks = [0, *(10**i for i in range(10) if 10**i < largest_count / 2), largest_count]
            bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
        bar.set_label(label, fontsize=9.5)
        bar.ax.tick_params(labelsize=9)
        bar.outline.set_edgecolor('0.75')
    for axes, name, frame in zip(grid[0], ('Before', 'After'), (before, after), strict=True):
        axes.set_title(f'{name}: {_amount(frame)}', fontsize=10.5, fontweight='bold')
    figure.savefig(path, bbox_inches='tight')


def _laid_out(units: int) -> tuple[int, int]:
    """Rows and columns of a full grid of so many units, as near to a square as there is one."""
    columns = next(n for n in range(math.isqrt(units - 1) + 1, units + 1) if units % n == 0)
    return units // columns, columns


def units(left: Mapping[str, np.ndarray], path: Path) -> None:
    """The architecture before and after: a square for each unit, coloured where it is left.

    Args:
      left: of every group of units, by what it is called, which are left, as booleans.
      path: of the picture.
    """
    grids = {name: kept.reshape(_laid_out(kept.size)) for name, kept in left.items()}
    across = min(4, len(grids))
    down = -(-len(grids) // across)
    figure = _figure(2.6 * across, 0.4 + 3 * down)
    all_axes = figure.subplots(down, across, squeeze=False).ravel()
    colours = ListedColormap(['0.9', BLUE])
    for axes, (name, grid) in zip(all_axes, grids.items(), strict=False):
        rows, columns = grid.shape
        axes.pcolormesh(
            grid.astype(int), cmap=colours, vmin=0, vmax=1, edgecolors='white',
            linewidth=min(2.0, 20 / columns),
        )  # fmt: skip
        axes.set(aspect='equal', anchor='N', xlim=(0, columns), ylim=(rows, 0))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(f'{name}\n{grid.sum()} of {grid.size}', fontsize=9.5)
    for axes in all_axes[len(grids) :]:
        axes.set_axis_off()
    figure.savefig(path, bbox_inches='tight')


def _text(text: str, size: int) -> np.ndarray:
    """One line of text as indices into the greys of `PALETTE`, (height, width) uint8."""
    font = ImageFont.truetype(findfont('DejaVu Sans'), size)  # Matplotlib brings it along
    image = Image.new('L', (math.ceil(font.getlength(text)), math.ceil(1.4 * size)), 255)
    ImageDraw.Draw(image).text((0, 0), text, fill=0, font=font)
    return (BLACK + np.round(np.asarray(image) / 255 * (WHITE - BLACK))).astype(np.uint8)


def _paste(canvas: np.ndarray, image: np.ndarray, top: int, left: int) -> None:
    """Puts an image onto the canvas, cut at the right border of the canvas."""
    target = canvas[top : top + image.shape[0], left : left + image.shape[1]]
    target[:] = image[:, : target.shape[1]]


def _compose(title: str, panels: Sequence[_Panel], limits: Sequence[float]) -> np.ndarray:
    """A frame of the GIF: panels of about one height in a row, as indices into `PALETTE`."""
    margin, header, caption = 20, 44, 26
    images = []
    for panel, limit in zip(panels, limits, strict=True):
        scale = max(1, round(GIF_PANEL / panel.values.shape[0]))
        image = _indices(panel, limit).repeat(scale, axis=0).repeat(scale, axis=1)
        images.append(np.pad(image, 1, constant_values=GAP))
    height = max(image.shape[0] for image in images)
    width = sum(image.shape[1] + margin for image in images) + margin
    canvas = np.full((header + caption + height + margin, width), WHITE, np.uint8)
    _paste(canvas, _text(title, 20), margin // 2, margin)
    left = margin
    for panel, image in zip(panels, images, strict=True):
        _paste(canvas, _text(panel.title, 13), header, left)
        _paste(canvas, image, header + caption, left)
        left += image.shape[1] + margin
    return canvas


def animate(frames: Sequence[tuple[int, Frame]], path: Path) -> None:
    """A GIF of the weights over the epochs, with at most 60 frames and, at most, about 3 MB.

    It is composed of small index images, not drawn by Matplotlib, which would take a minute.
    """
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), GIF_FRAMES)).round().astype(int)
    epochs = [frames[i][0] for i in chosen]
    panels = _panels_of([frames[i][1] for i in chosen])
    limits = [_limit(column) for column in zip(*panels, strict=True)]
    images = []
    for i, epoch, row in zip(chosen, epochs, panels, strict=True):
        title = f'Epoch {epoch}: {_amount(frames[i][1])}'
        image = Image.fromarray(_compose(title, row, limits))
        image.putpalette(PALETTE.tobytes())
        images.append(image)

    while True:
        times = [int(np.clip(6000 / len(images), 80, 500))] * (len(images) - 1) + [3000]
        file = io.BytesIO()
        images[0].save(file, 'GIF', save_all=True, append_images=images[1:], duration=times, loop=0)
        if file.tell() <= GIF_BYTES or len(images) <= 2:
            break
        images = images[::-2][::-1]  # every other frame, and the last one
    path.write_bytes(file.getvalue())


def write_all(
    out: Path,
    params: Mapping[str, Any],
    history: History,
    threshold: float,
    frames: Sequence[tuple[int, Frame]],
) -> None:
    """Writes all pictures of a run into `out / 'pictures'`."""
    directory = out / 'pictures'
    directory.mkdir(parents=True, exist_ok=True)
    if history:
        training_curves(history, directory / 'curves.png')
    if any('log_sigma2' in layer for layer in _layers(params).values()):
        log_alpha_histogram(params, threshold, directory / 'log_alpha.png')
    if not frames:
        frames = [(history[-1]['epoch'] if history else 0, snapshot(params, threshold))]
    weights(frames[0][1], frames[-1][1], directory / 'weights.png')
    animate(frames, directory / 'weights.gif')
