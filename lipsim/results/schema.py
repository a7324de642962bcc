"""What results.json holds: a type for every section. docs/results_json.md says what each field means.

Scores are shares in [0, 1]; ε and radii are ℓ2 lengths in input pixels in [0, 1] unless a norm says otherwise; numbers
that are not finite are null. A mapping is either a record, a class here with its fields, or goes from names to values
of one kind, ``dict[str, …]``: never both.
"""

from typing import Literal, NotRequired, TypedDict

SCHEMA = 2
"""The version of results.json that this package writes; a change of meaning has a new number."""

# Label of a budget (see `lipsim.results.eps_label`) → score; null where no triplet had a majority of votes.
Scores = dict[str, float | None]


class Source(TypedDict):
    """Which weights and which data the numbers of a section belong to."""

    weights_sha256: str
    data_sha256: dict[str, str]


class RadiusSummary(TypedDict):
    """Statistics of the certified radii of the references of a set."""

    mean: float | None
    median: float | None
    min: float | None
    max: float | None


class CertifiedCurves(TypedDict):
    """Certified scores over a fine grid of ε."""

    eps: list[float]
    certified: list[float | None]
    published: list[float | None]
    joint: list[float | None]


class CertifiedSet(TypedDict):
    """What is certified on a test set or a part of one."""

    num_triplets: int
    num_tied_votes: int
    majority: float | None
    vote: float | None
    certified: Scores
    published: Scores
    joint: Scores
    radius: RadiusSummary
    one_pixel_immune: float | None
    curve: CertifiedCurves


class Certification(TypedDict):
    """What :class:`lipsim.callbacks.CertifyRadii` finds out."""

    lipschitz: float | None
    layers: dict[str, float | None]
    anchor: float
    feature_error: float | None
    feature_error_kind: str
    feature_error_sample: int
    feature_error_factor: float
    resize: str
    precision: str
    eps: list[float]
    sets: dict[str, CertifiedSet]


class CertifiedSection(Source, Certification):
    """Certification of these weights on these data."""


class SmoothedCurve(TypedDict):
    """Certified scores of a smoothed metric over a fine grid of ε."""

    eps: list[float]
    certified: list[float | None]


class SmoothedScores(TypedDict):
    """What randomized smoothing certifies of a metric's answers."""

    natural: float | None
    vote: float | None
    abstained: float | None
    certified: Scores
    certified_single: NotRequired[Scores]
    radius: RadiusSummary
    passes: int
    passes_per_certified: float | None
    curve: SmoothedCurve


class SmoothedSet(TypedDict):
    """Smoothed metrics on a test set or a part of one."""

    num_triplets: int
    num_tied_votes: int
    metrics: dict[str, SmoothedScores]


class Smoothing(TypedDict):
    """What :class:`lipsim.callbacks.CertifySmoothed` finds out."""

    sigma: float
    n: int
    n0: int
    alpha: float
    moving: Literal["reference", "left", "right", "all"]
    seed: int
    max_triplets: int | None
    eps: list[float]
    sets: dict[str, SmoothedSet]


class SmoothedSection(Source, Smoothing):
    """Smoothing of these weights, and of others, on these data."""


class SummedCurves(TypedDict):
    """Certified scores of a sum over a fine grid of ε."""

    eps: list[float]
    certified: list[float | None]
    joint: list[float | None]


class SummedSet(TypedDict):
    """What the sum of two metrics answers on a test set or a part of one."""

    num_triplets: int
    num_tied_votes: int
    majority: float | None
    vote: float | None
    certified: Scores
    joint: Scores
    radius: RadiusSummary
    curve: SummedCurves


class Summation(TypedDict):
    """What :class:`lipsim.callbacks.CertifySum` finds out."""

    second: str
    second_sha256: str
    weight: float
    scale: float
    feature_error: float | None
    second_feature_error: float | None
    eps: list[float]
    sets: dict[str, SummedSet]


class SummedSection(Source, Summation):
    """The sum of these weights' metric and another one, on these data."""


class RetrievalScores(TypedDict):
    """Recall or k-NN accuracy on a set of queries, at one k."""

    natural: float | None
    certified: Scores
    attacked: Scores
    natural_of_attacked: NotRequired[float | None]


class RetrievalSet(TypedDict):
    """What a search in a gallery finds for a set of queries, by the number of neighbours."""

    num_queries: int
    num_gallery: int
    num_classes: int
    num_attacked: int
    violations: int
    recall: dict[str, RetrievalScores]
    knn: dict[str, RetrievalScores]


class Retrieval(TypedDict):
    """What :class:`lipsim.callbacks.CertifyRetrieval` finds out."""

    lipschitz: float | None
    feature_error: float | None
    ks: list[int]
    eps: list[float]
    steps: int
    seed: int
    sets: dict[str, RetrievalSet]


class RetrievalSection(Source, Retrieval):
    """Searches with these weights, on these data."""


class AttackedMetric(TypedDict):
    """What attacks leave of a metric's score on a set."""

    natural: float | None
    no_gradient: int
    attacked: Scores
    after: dict[str, Scores]


class AttackedSet(TypedDict):
    """What attacks leave on a test set or a part of one."""

    num_triplets: int
    num_tied_votes: int
    violations: int
    metrics: dict[str, AttackedMetric]


class AttackedSection(Source):
    """What :class:`lipsim.callbacks.AttackRobustness` finds out."""

    suite: bool
    attacks: list[str]
    norm: Literal[2, "inf", 0]
    target: Literal["reference", "left", "right", "all"]
    steps: int
    restarts: int
    queries: int
    seed: int
    eps: list[float]
    sets: dict[str, AttackedSet]


class NullSpaceMoves(TypedDict):
    """What becomes of references that move inside the kernel of the first operator."""

    mean_length: float | None
    median_change: float | None
    largest_change: float | None
    exact: float | None
    largest_distance: float | None
    flipped: float | None


class NullSpaceReach(TypedDict):
    """How far references have moved: means over a set, and the largest length."""

    mean_length: float | None
    largest_length: float | None
    rmse: float | None
    ssim: float | None
    lpips: float | None


class NullSpaceMetric(TypedDict):
    """The kernel of a metric's first operator: moves in it, or the reason for which there are none.

    ``same`` and ``answer`` are by direction, "random" and "semantic": how far the metric says "same", and how far its
    answer stays. (Files of earlier versions have neither.)
    """

    layer: str | None
    reason: str | None
    moves: NullSpaceMoves | None
    same: NotRequired[dict[str, NullSpaceReach]]
    answer: NotRequired[dict[str, NullSpaceReach]]


class NullSpaceSet(TypedDict):
    """The search on a test set or a part of one."""

    num_triplets: int
    metrics: dict[str, NullSpaceMetric]


class NullSpaceSection(Source):
    """What :class:`lipsim.callbacks.NullSpaceRobustness` finds out."""

    seed: int
    same: NotRequired[float | None]
    max_triplets: NotRequired[int | None]
    sets: dict[str, NullSpaceSet]


class ReachedDistances(TypedDict):
    """Quantiles, by label, of the largest ``d(x, x + δ)`` that an attack finds."""

    reached: dict[str, float | None]
    natural_median: float | None
    shares: dict[str, float | None]


class ComparedMetric(TypedDict):
    """A metric of `lipsim attack-tables`."""

    natural: float | None
    no_gradient: int
    l2: Scores
    linf: float | None
    alone: dict[str, float | None]
    one_pixel: float | None
    distances: ReachedDistances
    transfer: dict[str, float | None]


class Comparison(TypedDict):
    """What :func:`lipsim.evaluation.side_by_side.measure` finds out."""

    num_triplets: int
    num_tied_votes: int
    eps: list[float]
    alone_eps: float
    linf_eps: float
    steps: int
    queries: int
    seed: int
    metrics: dict[str, ComparedMetric]


class AttackTablesSection(Comparison):
    """The comparison on a data set."""

    data: str


class NaturalScores(TypedDict):
    """Scores of a metric as it is."""

    majority: float | None
    vote: float | None


class BaselineSet(TypedDict):
    """Plain distances on a test set."""

    metrics: dict[str, NaturalScores]


class BaselinesSection(TypedDict):
    """Natural scores of plain distances."""

    data_sha256: dict[str, str]
    sets: dict[str, BaselineSet]


class DurationsSection(TypedDict):
    """How long the stages of a run took."""

    seconds: dict[str, float]


class TripletCount(TypedDict):
    """How many triplets of a test set are evaluated."""

    evaluated: int
    in_set: int


class EvaluationSection(TypedDict):
    """What an evaluation of an exported metric was of."""

    weights_sha256: str
    metric_sha256: str
    checkpoint: str | None
    checkpoint_sha256: str | None
    image_size: int
    resize: str
    triplets: dict[str, TripletCount]
    sample_seed: int


class JointlySmoothed(TypedDict):
    """Scores of smoothed answers with noise on all three images, which certifies joint changes, too."""

    natural: float | None
    certified: Scores
    joint: Scores
    attacked: NotRequired[Scores]
    abstained: float | None
    pixels: float | None


class BenchmarkedSet(TypedDict):
    """Scores of a row of the benchmark on a test set; what the row has not is null or has no labels."""

    num_triplets: int
    num_attacked: int
    natural: float | None
    certified: Scores
    published: Scores
    joint: Scores
    attacked: Scores
    abstained: float | None
    pixels: float | None
    violations: int
    jointly_smoothed: NotRequired[JointlySmoothed]


class BenchmarkSection(Source):
    """A row of the benchmark, trained and measured with one seed; benchmarks/results.py writes it."""

    task: str
    row: str
    place: int
    seed: int
    recipe: str
    settings: dict[str, str | int | float]
    training_seconds: float
    steps: int
    parameters: int
    passes: float | None
    images_per_second: float | None
    device: str
    sets: dict[str, BenchmarkedSet]


class Sections(TypedDict, total=False):
    """The sections of results.json, each there once its part of a run has ended."""

    evaluation: EvaluationSection
    certified: CertifiedSection
    smoothed: SmoothedSection
    summed: SummedSection
    retrieval: RetrievalSection
    attacked: AttackedSection
    null_space: NullSpaceSection
    attack_tables: AttackTablesSection
    baselines: BaselinesSection
    durations: DurationsSection
    benchmark: BenchmarkSection


class Results(Sections):
    """The whole of results.json."""

    schema: int
    versions: dict[str, str]


class Environment(TypedDict):
    """environment.json of a training run: where its numbers come from."""

    command: list[str]
    versions: dict[str, str]
    commit: str | None
    platform: str
    processors: int | None
    accelerator: str
    devices: list[str]
    processes: int
    precision: str
    job: str | None
