"""Icons of a theme, by group, to WebDataset tars: icons_to_shards.py /usr/share/icons/oxygen/base/128x128 data/icons"""

import hashlib
import sys
from pathlib import Path

import webdataset

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
icons = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in sorted(folder.glob("*/*.png")) if not p.is_symlink()}
groups = ("actions", "apps", "devices", "mimetypes", "places", "status")
for split, digits in (("train", "3456789abcdef"), ("validation", "012")):  # by content, so that no picture is in both
    with webdataset.TarWriter(str(out / f"{split}-000.tar")) as tar:
        for digest, path in sorted(icons.items()):
            if path.parent.name in groups and digest[0] in digits:
                record = {"group": path.parent.name, "name": path.stem.replace("-", " ")}
                tar.write({"__key__": digest[:16], "png": path.read_bytes(), "json": record})
