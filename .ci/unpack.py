"""Writes a file out of archives within archives to standard output.

    unpack.py FOLDER ENDING... ENDING

The first ending is that of a file of the folder. Each further one is that of a member of the archive before.
"""

import io
import pathlib
import sys
import tarfile
import zipfile


def member(data, ending):
    """The member of an archive whose name has this ending."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(ending)]
            return archive.read(name)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        [name] = [name for name in archive.getnames() if name.endswith(ending)]
        return archive.extractfile(name).read()


def main(folder, first, *endings):
    [path] = [path for path in pathlib.Path(folder).iterdir() if path.name.endswith(first)]
    data = path.read_bytes()
    for ending in endings:
        data = member(data, ending)
    sys.stdout.buffer.write(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
