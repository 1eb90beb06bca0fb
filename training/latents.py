"""A pool of encoded clips on disk, made once and sampled by every training process."""

import math
from pathlib import Path

import torch

from training import procedural
from training.codec import Codec, pixels

ENCODE_BATCH = 4


@torch.no_grad()
def encode_shard(
    codec: Codec, folder: Path, shard: int, clips: int, frames: int, size: int, device: str = "cpu"
) -> Path:
    """Encode clips `shard * clips ...` of the training split into one file of normalised latents in `folder`.

    Returns:
        The file's path: a dict of `latents` `[clips, channels, latent_frames, height, width]` float16 and `captions`.
    """
    path = folder / f"{shard:04d}.pt"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    codec.model.to(device)
    indices = range(shard * clips, (shard + 1) * clips)
    latents, captions = [], []
    for start in range(0, clips, ENCODE_BATCH):
        batch = list(indices[start : start + ENCODE_BATCH])
        for index in batch:
            rng = procedural.rng_of("train", index)
            captions.append(procedural.caption_of(procedural.draw_words(rng), rng))
        latents.append(codec.encode(pixels("train", batch, frames, size).to(device)).half().cpu())
    temporary = path.with_suffix(".tmp")
    torch.save({"latents": torch.cat(latents), "captions": captions}, temporary)
    temporary.replace(path)
    return path


class LatentPool:
    """Random windows of the encoded clips in one folder; picks up shards that appear while it is in use."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards: dict[Path, dict] = {}
        self.refresh()

    def refresh(self) -> int:
        """Load new shards and return how many clips there are."""
        for path in sorted(self.folder.glob("*.pt")):
            if path not in self.shards:
                self.shards[path] = torch.load(path, mmap=True, weights_only=True)
        return sum(len(shard["captions"]) for shard in self.shards.values())

    def sample(
        self, batch: int, frames: int, later_share: float, generator: torch.Generator, stride: int = 1
    ) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Draw windows of `frames` latent frames, a share of them from later than a clip's start.

        Later windows begin at a multiple of `stride` latent frames.

        Returns:
            Latents `[batch, channels, frames, height, width]` float32, their captions, and a mask `[batch]` of the
            windows that do not begin with a clip's first frame.
        """
        shards = list(self.shards.values())
        windows, captions, later = [], [], []
        for _ in range(batch):
            draw = torch.rand(4, generator=generator).tolist()
            shard = shards[int(draw[0] * len(shards))]
            index = int(draw[1] * len(shard["captions"]))
            last = (shard["latents"].shape[2] - frames) // stride
            start = stride * (1 + math.floor(draw[3] * last)) if draw[2] < later_share and last > 0 else 0
            windows.append(shard["latents"][index, :, start : start + frames].float())
            captions.append(shard["captions"][index])
            later.append(start > 0)
        return torch.stack(windows), captions, torch.tensor(later)
