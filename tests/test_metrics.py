"""Metrics are those of their papers, whatever the library, and equal a well-known package's on the same weights."""

import math
import pickle
import sys
import types

import array_api_strict as strict
import numpy as np
import pytest
from scipy.linalg import sqrtm

from backends.pipeline.checkpoints.inert_pickle import ALLOWED
from backends.pipeline.metrics import extractors, statistics
from backends.pipeline.metrics.extractors import Extractor, Features, open_extractor
from backends.pipeline.metrics.figures import Metric, warnings
from backends.pipeline.metrics.statistics import Statistics, collect
from edm2_core.errors import InputError
from edm2_core.frechet import Gaussian, Moments, distance
from edm2_core.metrics import inception_score, kernel_distance, manifold_metrics

RNG = np.random.default_rng(0)
ONE = RNG.normal(size=(300, 12))
OTHER = RNG.normal(size=(200, 12)) @ RNG.normal(size=(12, 12)) / 3 + 0.5
IMAGES = RNG.integers(0, 256, size=(40, 3, 20, 20), dtype=np.uint8)


def gaussian(features):
    return Moments.of(features).gaussian()


def test_the_distance_is_the_formula_of_its_paper():
    a, b = gaussian(ONE), gaussian(OTHER)
    root = sqrtm(a.covariance @ b.covariance).real
    wanted = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert distance(a, b) == pytest.approx(wanted, rel=1e-11)
    assert distance(b, a) == pytest.approx(wanted, rel=1e-11)
    assert distance(a, a) == pytest.approx(0, abs=1e-12)


def test_diagonal_gaussians_have_a_closed_form():
    a = Gaussian(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([3.0, 1.0]), np.diag([1.0, 16.0]))
    assert distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-14)


def test_singular_covariances_do_no_harm():
    """Fewer images than features: in the space that they span the distance is that of a regular pair."""
    turn = np.linalg.qr(RNG.normal(size=(40, 40)))[0][:, :3]
    small = [RNG.normal(size=(n, 3)) * (1, 2, 3) for n in (10, 12)]
    wide = [features @ turn.T for features in small]
    assert distance(*map(gaussian, wide)) == pytest.approx(distance(*map(gaussian, small)), rel=1e-10)


@pytest.mark.parametrize("parts", [(1, 299), (100, 150, 50), tuple([10] * 30)])
def test_moments_of_parts_are_those_of_the_whole(parts):
    ends = np.cumsum(parts)
    moments = [Moments.of(ONE[end - n : end] + 1e3) for n, end in zip(parts, ends, strict=True)]
    joined = moments[0]
    for part in moments[1:]:
        joined = joined.joined(part)
    assert joined.count == 300
    assert joined.gaussian().covariance == pytest.approx(np.cov(ONE, rowvar=False), rel=1e-9, abs=1e-9)


def test_a_single_image_has_no_covariance():
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        gaussian(ONE[:1])


def test_kid_is_the_mean_over_all_pairs():
    def kernel(x, y):
        return (x @ y / 12 + 1) ** 3

    def pairs(x, y, apart):
        return np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if not (apart and i == j)])

    x, y = ONE[:30], OTHER[:20]
    wanted = pairs(x, x, True) + pairs(y, y, True) - 2 * pairs(x, y, False)
    assert kernel_distance(x, y) == pytest.approx(wanted, rel=1e-12)


def test_precision_and_recall_count_balls():
    """By their definitions, one feature at a time."""
    real, made, k = ONE[:60], 0.9 * ONE[60:100] + 0.1, 3

    def radius(x, i):
        return sorted(math.dist(x[i], other) for other in x)[k]

    def inside(x, balls):
        return [[math.dist(a, b) <= radius(balls, i) for i, b in enumerate(balls)] for a in x]

    of_made, of_real = np.array(inside(made, real)), np.array(inside(real, made))
    got = manifold_metrics(real, made, neighbours=k)
    wanted = {
        "precision": of_made.any(1).mean(),
        "recall": of_real.any(1).mean(),
        "density": of_made.sum() / (k * len(made)),
        "coverage": of_made.any(0).mean(),
    }
    assert got == pytest.approx(wanted, abs=1e-12)
    assert 0 < got["precision"] < 1


def test_the_inception_score_of_sure_and_even_classes_is_their_number():
    assert inception_score(100.0 * np.eye(7)) == pytest.approx(7, rel=1e-12)
    assert inception_score(np.zeros((5, 7))) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("library", ["strict", "torch", "jax"])
def test_every_library_gives_the_same(library):
    if library == "jax":
        jax = pytest.importorskip("jax")
        with jax.enable_x64(True):
            check_library(jax.numpy.asarray)
    else:
        check_library(strict.asarray if library == "strict" else pytest.importorskip("torch").asarray)


def check_library(make):
    one, other = make(ONE), make(OTHER)
    assert distance(gaussian(one), gaussian(other)) == pytest.approx(
        distance(gaussian(ONE), gaussian(OTHER)), rel=1e-10
    )
    assert kernel_distance(one, other) == pytest.approx(kernel_distance(ONE, OTHER), rel=1e-10)
    assert manifold_metrics(one, other) == pytest.approx(manifold_metrics(ONE, OTHER), rel=1e-10)
    assert inception_score(one) == pytest.approx(inception_score(ONE), rel=1e-10)


def test_features_of_different_extractors_are_refused():
    with pytest.raises(InputError, match="same features, got 12 and 11"):
        distance(gaussian(ONE), gaussian(OTHER[:, :11]))
    with pytest.raises(InputError, match="same extractor, got 12 and 11"):
        kernel_distance(ONE, OTHER[:, :11])
    with pytest.raises(InputError, match="at least 4 images, got 3"):
        manifold_metrics(ONE[:3], OTHER)


# ---- extractors


def test_pixels_are_averages_over_equal_areas():
    assert np.array_equal(extractors.pixels(IMAGES[:, :, :8, :5]), IMAGES[:, :, :8, :5].reshape(40, -1) / 255)
    halves = IMAGES[:, :, :16, :16].reshape(40, 3, 8, 2, 8, 2).mean(axis=(3, 5)).reshape(40, -1) / 255
    assert extractors.pixels(IMAGES[:, :, :16, :16]) == pytest.approx(halves, rel=1e-12)
    uneven = extractors.pixels(IMAGES).reshape(40, 3, 8, 8)
    assert uneven.mean(axis=(2, 3)) == pytest.approx(IMAGES.mean(axis=(2, 3)) / 255, rel=1e-12)


@pytest.mark.parametrize("name", ["inceptio", "nowhere:f", "math:nothing", "math:pi"])
def test_unknown_extractors_are_refused(name):
    with pytest.raises(InputError, match="an extractor must be"):
        open_extractor(name)


def test_an_own_extractor_is_measured_by(monkeypatch):
    module = types.ModuleType("own_features")
    module.brightness = lambda images: images.mean(axis=(2, 3))
    module.wrong = lambda images: images.mean()
    monkeypatch.setitem(sys.modules, "own_features", module)
    made = collect([IMAGES], [open_extractor("own_features:brightness")], keep=False)["own_features:brightness"]
    assert made.gaussian.mean == pytest.approx(IMAGES.mean(axis=(0, 2, 3)))
    with pytest.raises(InputError, match=r"must return \[40, D\] features, got \[\]"):
        open_extractor("own_features:wrong").extract(IMAGES)


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity, which imports torchvision, of which Inception needs nothing: a stand-in where there is none that
    fits the installed PyTorch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = types.ModuleType(f"torchvision{name}")
            module.CIFAR10 = module.STL10 = module.CIFAR100 = object
            monkeypatch.setitem(sys.modules, f"torchvision{name}", module)
        sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
    return pytest.importorskip("torch_fidelity")


@pytest.fixture
def inception(fidelity, tmp_path):
    """A file of Inception weights, drawn at random."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Fresh(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            """Keep the initial weights."""

    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty.pth")
    fresh = Fresh("fresh", ["2048"], str(tmp_path / "empty.pth"))
    torch.save(fresh.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_figures_are_those_of_torch_fidelity(inception, capsys):
    """On the same images and random weights: FID to 1e-6, KID with one subset of everything, Inception score."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    images = [IMAGES[:5], 255 - IMAGES[5:10] // 2]
    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], str(inception)
    )
    values, logits = zip(*(theirs(torch.from_numpy(part)) for part in images), strict=True)
    ours = open_extractor("inception", weights=str(inception))
    assert "not the Inception of published figures" in capsys.readouterr().out
    one, other = (collect([x[:2], x[2:]], [ours], keep=True)["inception"] for x in images)
    stats = [fid_features_to_statistics(part.double()) for part in values]
    fid = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert Metric.called("fid").of(one, other)["fid"] == pytest.approx(fid, rel=1e-6)
    kid = kid_features_to_metric(*(part.double() for part in values), kid_subsets=1, kid_subset_size=5, verbose=False)
    assert Metric.called("kid").of(one, other)["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-6)
    score = isc_features_to_metric(logits[0], splits=1)["inception_score_mean"]
    assert Metric.called("is").of(one, None)["is"] == pytest.approx(score, rel=1e-6)
    made = Metric.called("precision-recall").of(one, other)
    precision, recall = calculate_precision_recall_full(values[0].double(), values[1].double())
    assert (made["precision"], made["recall"]) == pytest.approx((precision, recall), abs=1e-6)


def test_weights_that_would_execute_something_are_refused(fidelity, tmp_path):
    class Evil:
        def __reduce__(self):
            return pytest.fail, ("executed",)

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(InputError, match="--weights must be torch-fidelity's Inception weights"):
        open_extractor("inception", weights=str(path))


@pytest.mark.parametrize("device", ["cpu", "tpu"])  # PyTorch has none called tpu: its fastest is taken
def test_dinov2_is_that_of_its_library(tmp_path, device):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=518)
    torch.manual_seed(1)
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    extractor = open_extractor("dinov2", weights=str(tmp_path), device=device)
    x = torch.nn.functional.interpolate(
        torch.from_numpy(IMAGES[:3]).float(), size=(224, 224), mode="bicubic", antialias=True
    )
    mean, std = (torch.tensor(n).reshape(3, 1, 1) for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = network((x / 255 - mean) / std).last_hidden_state[:, 0]
    assert extractor.extract(IMAGES[:3]).values == pytest.approx(wanted.double().numpy(), rel=1e-4, abs=1e-4)
    assert len(extractor.weights) == 64
    with pytest.raises(InputError, match="must be a folder or an ID of the hub"):
        open_extractor("dinov2", weights=str(tmp_path / "nothing"))


# ---- statistics


def extractor(name="own", weights="", dim=3):
    return Extractor(name, weights, lambda images: Features(images.reshape(len(images), -1)[:, :dim] / 255.0))


def test_statistics_do_not_depend_on_batches_and_survive_their_file(tmp_path):
    whole = collect([IMAGES], [extractor()], keep=True)["own"]
    parts = collect([IMAGES[:7], IMAGES[7:8], IMAGES[8:]], [extractor()], keep=True)["own"]
    assert parts.gaussian.covariance == pytest.approx(whole.gaussian.covariance, rel=1e-12)
    assert np.array_equal(parts.features, whole.features)
    statistics.save(tmp_path / "s.npz", whole)
    read = statistics.load(tmp_path / "s.npz", extractor())
    assert (read.count, read.size) == (40, (20, 20))
    assert np.array_equal(read.gaussian.mean, whole.gaussian.mean)
    assert np.array_equal(read.features, whole.features)


def test_processes_join_what_each_has_seen():
    parts = [IMAGES[:9], IMAGES[9:]]
    alone = [collect([part], [extractor()], keep=True)["own"] for part in parts]

    def gather(array):  # what the other process gives in the same call
        return seen.setdefault(len(seen), array) is array and [array]

    packed = []
    for part in parts:
        seen: dict = {}
        collect([part], [extractor()], keep=True, gather=gather)
        packed.append(seen)
    calls = iter(range(len(packed[0])))
    both = collect(
        [parts[0]], [extractor()], keep=True, gather=lambda _, c=calls: [p[i] for i in [next(c)] for p in packed]
    )
    whole = collect([IMAGES], [extractor()], keep=True)["own"]
    assert both["own"].count == sum(one.count for one in alone) == 40
    assert both["own"].gaussian.covariance == pytest.approx(whole.gaussian.covariance, rel=1e-12)
    assert np.array_equal(both["own"].features, whole.features)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_official_statistics_are_read_and_nothing_in_them_runs(tmp_path, module):
    one = gaussian(RNG.normal(size=(500, 120)))  # 115 kB, which stay in their place in the file
    path = tmp_path / "img64.pkl"
    content = {"fid": {"mu": one.mean, "sigma": one.covariance}, "fd_dinov2": {"mu": one.mean, "sigma": one.covariance}}
    data = pickle.dumps(content, protocol=4)
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    path.write_bytes(data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c" + bytes([len(module)]) + module.encode()))
    read = statistics.load(path, extractor("inception", dim=120))
    assert np.array_equal(read.gaussian.mean, one.mean)
    assert np.array_equal(read.gaussian.covariance, one.covariance)
    with pytest.raises(InputError, match="must hold mu and sigma of own, got fid, fd_dinov2"):
        statistics.load(path, extractor())


def test_arrays_of_objects_are_refused(tmp_path):
    path = tmp_path / "img64.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": np.array([None, 1]), "sigma": 0}}))
    with pytest.raises(InputError, match="an array of dtype 'O8'"):
        statistics.load(path, extractor("inception"))


def test_statistics_of_another_network_are_refused(tmp_path):
    statistics.save(tmp_path / "s.npz", collect([IMAGES], [extractor(weights="a" * 64)], keep=False)["own"])
    with pytest.raises(InputError, match="same weights, got SHA-256 aaaaaaaa for bbbbbbbb"):
        statistics.load(tmp_path / "s.npz", extractor(weights="b" * 64))
    with pytest.raises(InputError, match="must be statistics of other, got those of own"):
        statistics.load(tmp_path / "s.npz", extractor("other"))
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert statistics.load(tmp_path / "theirs.npz", extractor()).count is None
    (tmp_path / "broken.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:200])
    with pytest.raises(InputError, match="must hold mean and covariance"):
        statistics.load(tmp_path / "broken.npz", extractor())


def test_images_of_mixed_size_and_features_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="one size, got 20x10 among 20x20"):
        collect([IMAGES, IMAGES[:, :, :10]], [extractor()], keep=False)
    broken = Extractor("own", "", lambda images: Features(np.full((len(images), 2), np.nan)))
    with pytest.raises(InputError, match="features must be finite"):
        collect([IMAGES], [broken], keep=False)


def made(count=10, dim=4, size=(8, 8), features=True):
    x = RNG.normal(size=(count, dim))
    return Statistics(
        extractor="own",
        weights="",
        gaussian=gaussian(x),
        count=count,
        size=size,
        features=x.astype(np.float32) if features else None,
    )


def test_a_reference_must_fit_the_metric():
    assert Metric.called("frechet@pixels").of(made(), made()).keys() == {"frechet@pixels"}
    with pytest.raises(InputError, match="one size, got 8x8 and 9x8"):
        Metric.called("frechet@pixels").of(made(), made(size=(8, 9)))
    with pytest.raises(InputError, match="needs the features of all images"):
        Metric.called("kernel@pixels").of(made(), made(features=False))
    with pytest.raises(InputError, match="must have a --reference, got none"):
        Metric.called("fid").of(made(), None)


@pytest.mark.parametrize(
    "name", ["FID", "frechet", "frechet@", "median@pixels", "frechet@vgg", "inception-score@pixels"]
)
def test_unknown_metrics_are_refused(name):
    with pytest.raises(InputError, match="a metric must be one of fid, fd-dinov2, kid"):
        Metric.called(name)


def test_few_images_are_said_to_be_few():
    said = warnings(Metric.called("frechet@pixels"), made(count=4))
    assert "of 4 images cannot be compared with figures of 50000" in said[0]
    assert "covariance of 4 images in 4 dimensions is singular" in said[1]
    assert warnings(Metric.called("kernel@pixels"), made(count=50_000)) == []


def test_only_inert_names_are_allowed_in_pickles():
    """Nothing that a pickle may name reaches files, the system or the interpreter."""
    for (module, name), stands_for in ALLOWED.items():
        at_home = getattr(stands_for, "__module__", None)
        assert isinstance(stands_for, str) or at_home in ("builtins", "collections") or "inert_pickle" in at_home, name
        assert module.partition(".")[0] in (
            "torch_utils", "dnnlib", "collections", "builtins", "__builtin__", "torch", "numpy", "_codecs"
        ), module  # fmt: skip
