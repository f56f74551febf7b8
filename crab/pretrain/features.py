"""Features of scenes as `crab preprocess` would cache them, but from pictures and sounds that never were a file.

A folder: coarse.npy and fine.npy float16 [N, 10, P, D], tokens.npy float16 [N, 10, P', D'], and masks/ with the index
maps that the samples name. Only arrays are read back, by the piece.

Legend: N scenes, P patches, P' audio tokens of a second.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crab.encoders.frozen import AudioEncoder, VisionEncoder
from crab.model.collate import Example
from crab.pretrain.fit import OnStep
from crab.pretrain.vision import DRAWN, spoiled
from crab.samples import Sample
from crab.synth.index_maps import write_maps
from crab.synth.make import Dice
from crab.synth.render import render_frame
from crab.synth.scene import Scene
from crab.synth.sound import render_mono

SAMPLE_RATE_HZ = 16_000


def write_features(
    folder: Path,
    pool: Sequence[Scene],
    video: VisionEncoder,
    audio: AudioEncoder,
    *,
    seed: int,
    on_step: OnStep,
) -> None:
    """Renders, spoils and encodes every scene, second by second. Needs about 1 MB a scene."""
    dice = Dice(seed, 4)
    size = video.image_size
    arrays: dict[str, np.ndarray] = {}
    for row, scene in enumerate(pool):
        frames = [
            spoiled(render_frame(scene, float(second), DRAWN), size, dice)
            for second in range(scene.duration_s)
        ]
        # Loudness must not matter: codecs and microphones change it.
        sound = render_mono(scene, SAMPLE_RATE_HZ) * np.float32(dice.between(0.7, 1.4))
        layers = video.encode(np.stack(frames))
        made = {
            "coarse": layers[min(layers)],
            "fine": layers[max(layers)],
            "tokens": audio.encode(sound.reshape(scene.duration_s, -1))["tokens"],
        }
        for name, array in made.items():
            if name not in arrays:
                arrays[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", np.float16, (len(pool), *array.shape)
                )
            arrays[name][row] = array
        (folder / "masks").mkdir(exist_ok=True)
        write_maps(scene, folder / "masks" / scene.clip)
        on_step(row + 1, {})


class SceneFeatures:
    """The folder of `write_features`, opened."""

    def __init__(self, folder: Path, layers: tuple[str, str]) -> None:
        self._folder, self._layers = folder, layers
        self.arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("coarse", "fine", "tokens")
        }

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def examples(self, row: int, samples: Sequence[Sample]) -> list[Example]:
        """Samples of the scene with that row, with its features and the true masks on the disk."""
        coarse, fine = self._layers
        features = {
            "video": {
                coarse: self.arrays["coarse"][row],
                fine: self.arrays["fine"][row],
            },
            "audio": {"tokens": self.arrays["tokens"][row]},
        }
        return [Example(sample=s.resolve(self._folder), features=features) for s in samples]
