"""An index of images: the nearest ones to a query, and how far the query may change before that does."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lipsim.certificates.gallery import Gallery, unit_vectors
from lipsim.certificates.geometry import cosine_distance
from lipsim.certificates.numbers import check_count
from lipsim.certificates.ranking import Ranking, rank
from lipsim.data.sets.folder import list_images
from lipsim.layers.base import evaluation_mode
from lipsim.layers.fingerprint import Fingerprint, fingerprint
from lipsim.metric import reading
from lipsim.metric.files import load
from lipsim.metric.index_files import (
    Records,
    embedding_fingerprint,
    gather,
    read_parts,
    read_records,
    write_part,
    write_records,
)
from lipsim.metric.index_reading import embed_files, is_unchanged
from lipsim.metric.perceptual_metric import PerceptualMetric
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path
from lipsim.utils.precision import full_precision
from lipsim.utils.progress import Progress

Query = reading.Image
_CHUNK = 1024  # images between two files of an unfinished index
_CANDIDATES = 20  # of an approximate search, for each neighbour asked for, and 100 more


@dataclass(frozen=True)
class Changes:
    """What :meth:`ImageIndex.update` did: numbers of images.

    Attributes:
        kept: images whose embedding was there, or is that of a copy.
        embedded: new or changed images, of copies one.
        removed: images that are in the index no more.
        skipped: files that cannot be used → the reason.
        passed_over: what else there was in the folder, in words; empty where nothing was.
    """

    kept: int
    embedded: int
    removed: int
    skipped: dict[str, str]
    passed_over: str


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The nearest images of each query, nearest first, and radii for the query in the pixels that the metric sees.

    Attributes:
        names: paths of the images, ``k`` for each of ``N`` queries.
        items: ``(N, k)`` int64, their rows in the index.
        distance: ``(N, k)`` float64.
        rank_radius: ``(N, k)`` float64: the image at a rank keeps it for every change of the query that is shorter in
            ℓ2. That of rank 1 certifies the top-1 answer. Ties have 0.
        set_radius: ``(N,)`` float64, of the set of these ``k`` images; ∞ where the index has no others.
        compared: how many images each certificate is about: all of the index, or the candidates of an approximate
            search, among which alone it holds.
        total: images of the index.
    """

    names: list[list[str]]
    items: Tensor
    distance: Tensor
    rank_radius: Tensor
    set_radius: Tensor
    compared: int
    total: int

    @property
    def top_radius(self) -> Tensor:
        """Radius ``(N,)`` within which the nearest image stays the nearest."""
        return self.rank_radius[:, 0]


class ImageIndex:
    """Embeddings of image files, which queries are compared with; :meth:`build`, :meth:`load` and :meth:`search`.

    Embeddings are kept in float32, as the metric computed them. Their error, as far as it is known where they were
    computed and where they are used, is part of every certificate; without a bound every radius is 0.

    Args:
        metric: whose embeddings these are.
        root: folder that the names are relative to; None: names are paths.

    Attributes:
        metric: as given.
        root: as given.
        records: the images, in the order of their names.
        feature_error: the error of an embedding that certificates cover besides the metric's own.
        skipped: files that could not be used → the reason.

    Example:
        >>> import tempfile, lipsim
        >>> from PIL import Image
        >>> metric = lipsim.load("quickstart")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for level in (10, 120, 250):
        ...         _ = Image.new("RGB", (64, 64), (level, 0, 0)).save(f"{folder}/{level}.png")
        ...     index = ImageIndex.build(metric, folder)
        ...     found = index.search(torch.zeros(1, 3, 64, 64), k=2)
        >>> [Path(name).name for name in found.names[0]], bool(found.top_radius > 1)
        (['10.png', '120.png'], True)
    """

    def __init__(self, metric: PerceptualMetric, root: Path | None = None) -> None:
        self.metric, self.root = metric, root
        self.records = Records()
        self.skipped: dict[str, str] = {}
        self.feature_error = 0.0
        self._of = ""  # what the records were embedded with, by embedding_fingerprint
        self._seen: Fingerprint | None = None  # the encoder that was known to be that
        self._gallery: Gallery | None = None
        self._approximate: Any = None

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def build(
        cls,
        metric: PerceptualMetric,
        images: str | Path | Sequence[str | Path],
        *,
        batch_size: int = 32,
        unfinished: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """An index of the images under a folder, at any depth, or of some files. Arguments as of :meth:`update`."""
        index = cls(metric, None if not isinstance(images, str | Path) else user_path(images))
        index.update(images, batch_size=batch_size, unfinished=unfinished, progress=progress)
        return index

    def update(
        self,
        images: str | Path | Sequence[str | Path] | None = None,
        *,
        batch_size: int = 32,
        unfinished: Path | None = None,
        progress: Progress | None = None,
    ) -> Changes:
        """Bring the index up to date: embed what is new or has changed, and drop what is there no more.

        A file of the same size and time is taken to be the same; another time, or one so short before the file was read
        that it may hide a change, is settled by the hash of its content. Equal contents are embedded once, also under
        another name. Where the metric has other weights by now, all images are embedded again. Of the images no more
        than a few hundred are in memory at a time.

        Args:
            images: the folder, or the files that the index is to have; None: the folder of the index.
            batch_size: images embedded at once.
            unfinished: folder where finished embeddings are kept meanwhile, so that the same call continues where it
                was cut short; it is for the caller to remove (:meth:`save` does) when the index is safe.
            progress: told how far it is.

        Raises:
            FileNotFoundError: no such folder, or no image in it.
            ValueError: an index of files that is to be updated without being told which, or a metric in half precision,
                whose embeddings nothing could be searched in.
        """
        batch_size = check_count("batch_size", batch_size)
        self.metric.check_precision()
        root, names, passed_over = self._listed(images)
        of = embedding_fingerprint(self.metric)
        stale = of != self._of
        parts, error = read_parts(unfinished, of)
        blocks: list[Records] = [Records() if stale else self.records, *parts]
        by_name = {name: (b, i) for b, block in enumerate(blocks) for i, name in enumerate(block.names)}
        by_hash = {content: (b, i) for b, block in enumerate(blocks) for i, content in enumerate(block.hashes)}
        old = set(self.records.names)
        skipped: dict[str, str] = {}
        chosen: dict[str, tuple[int, int]] = {}
        unread = []
        for name in names:
            place = by_name.get(name)
            if place is not None and is_unchanged(Path(root or "", name), blocks[place[0]], place[1]):
                chosen[name] = place
            else:
                unread.append(name)
        advance = progress.counter(len(unread), "images") if progress is not None else None
        embedded = 0
        with full_precision(), evaluation_mode(self.metric.encoder), torch.no_grad():
            for start in range(0, len(unread), _CHUNK):
                some = unread[start : start + _CHUNK]
                block, count, failed = embed_files(self.metric, root, some, by_hash, blocks, batch_size, advance)
                skipped |= failed
                embedded += count
                chosen |= {name: (len(blocks), i) for i, name in enumerate(block.names)}
                by_hash |= {content: (len(blocks), i) for i, content in enumerate(block.hashes)}
                blocks.append(block)
                if unfinished is not None and count:
                    write_part(unfinished, block, of, self._error_of(block))
        # Only now, all at once: an update that is broken off leaves the index as it was.
        self.root = root
        self.records = gather(blocks, [chosen[name] for name in names if name in chosen])
        self.skipped, self._of, self._seen = skipped, of, None
        # Also of what other devices have computed.
        self.feature_error = max(0.0 if stale else self.feature_error, error, self._error_of(self.records))
        self._gallery = self._approximate = None
        return Changes(
            kept=len(self.records) - embedded,
            embedded=embedded,
            removed=len(old - set(self.records.names)),
            skipped=skipped,
            passed_over=passed_over,
        )

    def save(self, path: str | Path, *, metric: str = "", unfinished: Path | None = None) -> Path:
        """Write the index.

        Args:
            path: ``….safetensors``.
            metric: where the metric is from, a file or a bundled name, for those who load the index.
            unfinished: folder of :meth:`update`, which is removed then.

        Raises:
            ValueError: there is no image in it.
            OSError: the file cannot be written.
        """
        if not len(self):
            raise LipsimError("expected an index with images, got none that could be read")
        header = {
            "fingerprint": self._of,
            "metric": metric,
            "root": None if self.root is None else str(self.root.absolute()),
            "feature_error": self.feature_error,
            **self._framing,
        }
        written = user_path(path)
        write_records(written, self.records, header, self.skipped)
        if unfinished is not None and unfinished.is_dir():
            shutil.rmtree(unfinished)
        return written

    @classmethod
    def load(cls, path: str | Path, metric: PerceptualMetric | None = None) -> Self:
        """Read an index that :meth:`save` wrote.

        Args:
            path: the file.
            metric: the metric that it was built with, or an export of equal weights; None: the file of the metric, or
                the bundled name, that the index says it is of.

        Raises:
            FileNotFoundError: no such file, or no such metric.
            ValueError: it is no index, damaged, or of a metric with other embeddings.
        """
        records, header, skipped = read_records(user_path(path))
        if metric is None:
            if not header["metric"]:
                raise LipsimError(f"{path} does not say where its metric is; give the metric")
            metric = load(header["metric"], framing=header.get("framing"), grid=header.get("grid"))
        own = embedding_fingerprint(metric)
        if header["fingerprint"] != own:
            named = f" ({header['metric']})" if header["metric"] else ""
            way = header.get("framing", "stretch")
            way += f" with a grid of {header['grid']}" if "grid" in header else ""
            raise LipsimError(
                f"{path} has embeddings of another metric{named}, or of images prepared in another way (its framing is "
                f"{way}); give that one, or index the images again into another file"
            )
        index = cls(metric, None if header["root"] is None else Path(header["root"]))
        index.records, index.skipped = records, skipped
        index.feature_error, index._of = header["feature_error"], own
        return index

    @property
    def _framing(self) -> dict[str, Any]:
        """How images come to the metric, where that is not how its file says."""
        images = self.metric.preprocess
        return {"framing": images.framing} | ({"grid": images.grid} if images.framing == "tiles" else {})

    def path(self, item: int) -> str:
        """The file of a row."""
        name = self.records.names[item]
        return name if self.root is None else str(self.root / name)

    def search(self, query: Query | Iterable[Query], k: int = 5, *, approximate: bool = False) -> SearchResult:
        """The ``k`` nearest images of each query, with certificates over the whole index.

        Args:
            query: floating-point images ``(N, 3, S, S)`` as the metric takes them; or one or several of any kind that
                :meth:`lipsim.PerceptualMetric.read` takes, such as a path.
            k: how many; all where the index has fewer.
            approximate: look at candidates alone, which faiss finds (``pip install 'lipsim[faiss]'``): certificates
                hold among these then, and neighbours may be missed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an image that the metric refuses, no image, or what :meth:`search_features` refuses.
        """
        if isinstance(query, Tensor) and query.ndim == 4 and query.is_floating_point():
            images = query.to(self.metric.device, self.metric.dtype)
        else:
            images = self.metric.read(query)
        with full_precision(), evaluation_mode(self.metric.encoder), torch.no_grad():
            z = self.metric.embed(images)
        return self.search_features(z, k, approximate=approximate)

    @torch.no_grad()
    def search_features(self, z: Tensor, k: int = 5, *, approximate: bool = False) -> SearchResult:
        """:meth:`search` from features ``(N, D)`` of the queries, before anchor and projection.

        Raises:
            ValueError: features in half precision, an index without images, or a metric whose weights have changed
                since they were embedded.
        """
        k = check_count("k", k)
        if not len(self):
            raise LipsimError("expected an index with images to search in, got an empty one")
        self.metric.check_precision(z)
        self._check_weights()
        z, k = z.cpu(), min(k, len(self))
        options = {"lipschitz": math.inf, "feature_error": 0.0}
        if self.metric.has_bound:
            options = {key: value for key, value in self.metric.certificate_options.items() if key != "anchor"}
            options["feature_error"] = max(options["feature_error"], 2 * self.feature_error)
        with full_precision():
            if approximate:
                ranking, compared = self._search_candidates(z, k, options)
            else:
                ranking, compared = rank(z, self._prepared(), k=k, **options), len(self)
        nearest = self.records.features[ranking.items].double()
        return SearchResult(
            names=[[self.path(i) for i in row] for row in ranking.items.tolist()],
            items=ranking.items,
            distance=cosine_distance(z.double().unsqueeze(1), nearest, self.metric.anchor),
            rank_radius=ranking.rank_radius,
            set_radius=ranking.set_radius,
            compared=compared,
            total=len(self),
        )

    def _check_weights(self) -> None:
        """Refuse to compare with embeddings of weights that the metric has no more: they are at no distance from it."""
        seen = fingerprint(self.metric.encoder, repr(self.metric.preprocess))
        if seen != self._seen and embedding_fingerprint(self.metric) != self._of:
            raise LipsimError(
                "the metric has changed since its index was made; bring it up to date with index.update()"
            )
        self._seen = seen

    def _prepared(self) -> Gallery:
        if self._gallery is None or self._gallery.anchor != self.metric.anchor:
            self._gallery = Gallery(self.records.features, self.metric.anchor)
        return self._gallery

    def _search_candidates(self, z: Tensor, k: int, options: dict[str, float]) -> tuple[Ranking, int]:
        """Ranks among the candidates of each query that faiss finds."""
        try:
            import faiss  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise LipsimError(
                "an approximate search needs faiss; install it with pip install 'lipsim[faiss]', or search exactly"
            ) from error
        count = min(len(self), _CANDIDATES * k + 100)
        if self._approximate is None:
            unit = unit_vectors(self.records.features, self.metric.anchor).float().numpy()
            # As many as faiss trains well: it wants 39 points for each.
            cells = max(1, min(round(math.sqrt(len(self))), len(self) // 39))
            self._approximate = faiss.index_factory(unit.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
            self._approximate.train(unit)
            self._approximate.add(unit)
            self._approximate.nprobe = min(cells, max(8, cells // 8))
        _, found = self._approximate.search(unit_vectors(z, self.metric.anchor).float().numpy(), count)
        parts = []
        fewest = count
        for row, items in zip(z, torch.from_numpy(found), strict=True):
            items = items[items >= 0].sort().values
            if len(items) < k:
                raise LipsimError(f"the cells that faiss looked at have {len(items)} images, fewer than k = {k}")
            fewest = min(fewest, len(items))
            ranking = rank(row[None], Gallery(self.records.features[items], self.metric.anchor), k=k, **options)
            parts.append(Ranking(items[ranking.items], ranking.rank_radius, ranking.set_radius))
        return Ranking(
            torch.cat([part.items for part in parts]),
            torch.cat([part.rank_radius for part in parts]),
            torch.cat([part.set_radius for part in parts]),
        ), fewest

    def _listed(self, images: str | Path | Sequence[str | Path] | None) -> tuple[Path | None, list[str], str]:
        """The folder and the names of the images that the index is to have, sorted, and what was passed over."""
        if images is None and self.root is None:
            raise LipsimError("expected the files of an index that has no folder, got none")
        if images is None or isinstance(images, str | Path):
            root = self.root if images is None else user_path(images)
            assert root is not None
            listed = list_images(root)
            return root, [os.fsdecode(bytes(name)) for name in listed.names], listed.skipped
        return None, sorted({str(user_path(path).absolute()) for path in images}), ""

    def _error_of(self, records: Records) -> float:
        """The error of embeddings that were computed here, that of rounding them to float32 included.

        Also without a bound, which the metric that loads the index may have: as it is declared then, without a search.
        """
        if not len(records):
            return 0.0
        error = self.metric.feature_error if self.metric.has_bound else self.metric.declared_feature_error
        if self.metric.dtype == torch.float64:
            longest = max(
                float(torch.linalg.vector_norm(rows.double(), dim=1).amax()) for rows in records.features.split(_CHUNK)
            )
            error += 2.0**-23 * longest
        return error
