"""The README's pictures of the dashboard, from what ``make panels`` has drawn: in 256 colours, to stay small."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DRAWN = ROOT / "build" / "observability"
KEPT = ROOT / "docs" / "images"
PICTURES = {"overview-dark.png": "dashboard-overview.png", "trust-dark.png": "dashboard-trust.png"}
MOST_BYTES = 300_000


def main() -> None:
    """Write them. Raises SystemExit where there is nothing to write from, or a picture is too large."""
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, kept in PICTURES.items():
        if not (DRAWN / name).is_file():
            raise SystemExit(f"{DRAWN / name}: not there; run make panels")
        with Image.open(DRAWN / name) as picture:
            # The other methods give rare colours away, and a line of a chart is one; kmeans keeps the ground's.
            few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        few.save(KEPT / kept, optimize=True)
        size = (KEPT / kept).stat().st_size
        print(f"{(KEPT / kept).relative_to(ROOT)}: {size / 1000:.0f} kB")
        if size > MOST_BYTES:
            raise SystemExit(f"{KEPT / kept}: over {MOST_BYTES / 1000:.0f} kB")


if __name__ == "__main__":
    main()
