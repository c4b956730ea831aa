"""Pictures as an animation: GIF, or MP4 where the extra ``video`` is installed."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FRAMES_PER_SECOND = 20


def animate(pictures: Sequence[np.ndarray], path: str) -> None:
    """Write pictures, uint8 ``[height, width, 3]``, as ``.gif`` or ``.mp4``. Raises ``ValueError`` where MP4 cannot be written."""
    if Path(path).suffix == ".mp4":
        _write_mp4(pictures, path)
        return
    from PIL import Image

    first, *others = (Image.fromarray(picture) for picture in pictures)
    first.save(path, save_all=True, append_images=others, duration=1000 // FRAMES_PER_SECOND, loop=0)


def without_a_screen() -> None:
    """Let pygame draw into memory: no window and no sound card is needed."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")


def frames_of(gif: str) -> list[np.ndarray]:
    """The pictures of a GIF."""
    from PIL import Image, ImageSequence

    with Image.open(gif) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def _write_mp4(pictures: Sequence[np.ndarray], path: str) -> None:
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ValueError("MP4 needs the package imageio-ffmpeg, which is an extra: pip install 'jrl[video]'") from None
    height, width = (size // 2 * 2 for size in pictures[0].shape[:2])  # the encoder wants even sizes
    writer = imageio_ffmpeg.write_frames(path, (width, height), fps=FRAMES_PER_SECOND, macro_block_size=1)
    with warnings.catch_warnings():  # JAX fears a fork, which becomes another program at once
        warnings.simplefilter("ignore", RuntimeWarning)
        writer.send(None)
    for picture in pictures:
        writer.send(np.ascontiguousarray(picture[:height, :width]))
    writer.close()
