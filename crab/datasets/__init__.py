"""Readers of data sets as they lie on disk, one file a source.

A reader is `read(folder, report)`: it finds the official annotation files below the folder, yields samples one by one
with the file and line that each came from, and tells the report about every row that became none. A new source is one
file and one row of this table.
"""

from crab.datasets import av_uie, ave, avsbench, llp, music_avqa, ref_avs, valor
from crab.datasets.report import Reader

SOURCES: dict[str, Reader] = {
    "ave": ave.read,
    "llp": llp.read,
    "avsbench": avsbench.read,
    "ref-avs": ref_avs.read,
    "music-avqa": music_avqa.read,
    "valor": valor.read,
    "av-uie": av_uie.read,
}

__all__ = ["SOURCES"]
