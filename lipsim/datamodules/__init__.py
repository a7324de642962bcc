"""Data modules: the sets of lipsim.data behind the loaders that a trainer asks for."""

import lipsim.utils.matplotlib_backend  # noqa: F401  before Lightning, which imports matplotlib
from lipsim.datamodules.bapps import BappsData
from lipsim.datamodules.base import TripletData
from lipsim.datamodules.builtin import BuiltinData
from lipsim.datamodules.folder import ImageFolderData
from lipsim.datamodules.labelled import LabelledFolderData
from lipsim.datamodules.material import MaterialData
from lipsim.datamodules.nights import NightsData
from lipsim.datamodules.photos import PhotoData
from lipsim.datamodules.table import TableData

__all__ = [
    "BappsData",
    "BuiltinData",
    "ImageFolderData",
    "LabelledFolderData",
    "MaterialData",
    "NightsData",
    "PhotoData",
    "TableData",
    "TripletData",
]
