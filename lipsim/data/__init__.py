"""Triplet sets, image folders and transforms."""

from lipsim.data.builtin.triplets import BuiltinTriplets
from lipsim.data.contracts import TripletDataModule, TripletSet
from lipsim.data.order import TrainingLoader, TrainingOrder, training_loader
from lipsim.data.pack import ImagePack
from lipsim.data.packing import pack_images
from lipsim.data.registry import open_sets, sample_triplets
from lipsim.data.sets.bapps import BappsTriplets
from lipsim.data.sets.folder import FolderImages
from lipsim.data.sets.material import MaterialTriplets
from lipsim.data.sets.nights import NightsTriplets
from lipsim.data.sets.pairs import PairTable
from lipsim.data.sets.photos import PhotoTriplets
from lipsim.data.sets.table import TableTriplets
from lipsim.data.transforms import CentralCrop, Preprocess, load_image, read_image
from lipsim.data.triplet import SharedTriplet, Triplet, collate_triplets

__all__ = [
    "BappsTriplets",
    "BuiltinTriplets",
    "CentralCrop",
    "FolderImages",
    "ImagePack",
    "MaterialTriplets",
    "NightsTriplets",
    "PairTable",
    "PhotoTriplets",
    "Preprocess",
    "SharedTriplet",
    "TableTriplets",
    "TrainingLoader",
    "TrainingOrder",
    "Triplet",
    "TripletDataModule",
    "TripletSet",
    "collate_triplets",
    "load_image",
    "open_sets",
    "pack_images",
    "read_image",
    "sample_triplets",
    "training_loader",
]
