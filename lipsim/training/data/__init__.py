"""Data modules: the sets of lipsim.data behind the loaders that a trainer asks for."""

from lipsim.training.data.bapps import BappsData
from lipsim.training.data.base import TripletData
from lipsim.training.data.builtin import BuiltinData
from lipsim.training.data.images import ImageFolderData
from lipsim.training.data.material import MaterialData
from lipsim.training.data.nights import NightsData

__all__ = ["BappsData", "BuiltinData", "ImageFolderData", "MaterialData", "NightsData", "TripletData"]
