"""Diff-MVAE on CelebAMask-HQ (§4.2): generate a face's image, mask and attributes from any of them.

    python train_celeba.py                               synthetic faces, 32 px, minutes on a CPU
    python train_celeba.py --data CelebAMask-HQ          the released data set, 128 px, for a GPU
    python train_celeba.py --data CelebAMask-HQ --small  the same at 64 px, hours on a CPU

The same command continues a run that was stopped. README.md describes the results.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import diffmvae as dm
from diffmvae import InputError, encode_rows, sample

ATTRIBUTES = """Bald Bangs Black_Hair Blond_Hair Brown_Hair Bushy_Eyebrows Eyeglasses Gray_Hair
    Heavy_Makeup Male Mouth_Slightly_Open Mustache Pale_Skin Receding_Hairline Smiling Straight_Hair
    Wavy_Hair Wearing_Hat""".split()


class Settings(dm.Settings):
    """Settings for faces. README.md says which defaults are the paper's."""

    presets = {  # synthetic faces, CelebAMask-HQ, CelebAMask-HQ with --small
        "out": ("runs/faces", "runs/celeba", "runs/celeba-small"),
        "image_size": (32, 128, 64),
        "steps": (3200, 100_000, 20_000),
        "batch_size": (8, 64, 8),
        "log_prob_weight": (10.0, 10.0, 10.0),
        "latent_dim": (64, 256, 64),
        "model_channels": (32, 128, 24),
        "channel_mult": ([1, 2], [1, 2, 2, 3, 4], [1, 2, 2]),
        "vae_lr": (1e-3, 2e-4, 1e-3),
    }


# ---- Synthetic faces: CelebAMask-HQ's attributes, all visible, and its kind of mask --------------

FACES = {"train": 10_000, "test": 1_000, "fresh": 1_000}
HAIR = {"Gray_Hair": (165, 165, 172), "Blond_Hair": (232, 196, 92), "Brown_Hair": (118, 72, 36),
        "Black_Hair": (28, 22, 24)}
RED = (178, 62, 36)
FORM = ["Straight_Hair", "Wavy_Hair"]
FRONT = ["Bangs", "Receding_Hairline"]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def sample_attributes(rng):
    """Return a plausible combination of attributes, {name: bool}. rng: a numpy Generator."""
    a = {name: bool(rng.random() < 0.35) for name in ATTRIBUTES}
    a["Male"] = bool(rng.random() < 0.5)
    for names in (HAIR, FORM, FRONT):  # at most one of each
        chosen = rng.integers(len(names) + 1)
        for k, name in enumerate(names):
            a[name] = bool(k == chosen)
    absent = ["Heavy_Makeup"] if a["Male"] else ["Mustache", "Bald"]
    if a["Wearing_Hat"]:
        absent += FRONT
    if a["Bald"] and a["Male"]:
        absent += ["Wearing_Hat", *HAIR, *FORM, *FRONT]
    return {name: a[name] and name not in absent for name in ATTRIBUTES}


class Sketch:
    """A canvas of 128 × 128 pixels with its origin at (dx, dy). Shapes with x > 0 are drawn on
    both sides. The fourth channel is the mask."""

    def __init__(self, background, dx, dy):
        self.canvas = Image.new("RGBX", (128, 128), (*background, 0))
        self.pen = ImageDraw.Draw(self.canvas)
        self.dx, self.dy = dx, dy

    def add(self, shape, box, color, in_mask=True, **options):
        """Draw a shape, a method of ImageDraw, into box = (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = box
        sides = [(x0, x1), (-x1, -x0)] if x0 > 0 else [(x0, x1)]
        for left, right in sides:
            place = (left + self.dx, y0 + self.dy, right + self.dx, y1 + self.dy)
            fill = (*color, 255 if in_mask else 0)
            getattr(self.pen, shape)(place, fill=fill, **options)


def render_face(a, rng, size):
    """Render a face with attributes a, from back to front; rng varies the rest -> uint8 (size,
    size, 3 + 1). The mask covers everything except the background, the skin of the face, and makeup
    or a mustache on it."""
    background, clothes, hat = [tuple(rng.integers(30, 226, 3).tolist()) for _ in range(3)]
    dx, dy = int(rng.integers(62, 67)), int(rng.integers(-2, 3))
    w = int(rng.integers(26, 31))  # half the width of the head
    tone, light = 0.55 + 0.45 * rng.random(), 0.9 + 0.2 * rng.random()
    skin = (250, 226, 214) if a["Pale_Skin"] else tuple(int(c * tone) for c in (214, 158, 116))
    hair_color = next((color for name, color in HAIR.items() if a[name]), RED)
    hair = tuple(min(255, int(c * light)) for c in hair_color)
    shade = tuple(int(0.8 * c) for c in skin)
    brow = tuple(c // 2 for c in hair)
    lips = (205, 20, 55) if a["Heavy_Makeup"] else (176, 88, 84)
    opened = a["Mouth_Slightly_Open"]
    face = Sketch(background, dx, dy)
    # Hair behind the head, clothes, neck and ears; men have shorter hair and broader shoulders
    end, shoulder, neck, corner = (68, 47, 18, 10) if a["Male"] else (108, 35, 10, 24)
    if not a["Bald"]:
        face.add("ellipse", (-w - 7, 17, w + 7, 82), hair)
    if a["Straight_Hair"]:
        face.add("rectangle", (w - 6, 46, w + 9, end), hair)
    if a["Wavy_Hair"]:
        for y in range(26, end - 8, 12):
            face.add("ellipse", (w - 6 + y % 8, y, w + 9 + y % 8, y + 15), hair)
    face.add("rounded_rectangle", (-shoulder, 106, shoulder, 150), clothes, radius=corner)
    face.add("rectangle", (-neck, 86, neck, 111), shade)
    face.add("ellipse", (w - 3, 56, w + 6, 74), shade)
    # Head and the hair on it
    face.add("ellipse", (-w, 26, w, 102), skin, in_mask=False)
    if a["Male"]:
        face.add("rounded_rectangle", (2 - w, 62, w - 2, 103), skin, in_mask=False, radius=11)
    if not a["Bald"]:
        start, end = (222, 318) if a["Receding_Hairline"] else (200, 340)
        face.add("chord", (-w - 2, 20, w + 2, 84), hair, start=start, end=end)
    if a["Bangs"]:
        face.add("chord", (-w, 24, w, 84), hair, start=182, end=358)
    # Makeup, glasses, eyebrows, eyes and nose
    if a["Heavy_Makeup"]:
        face.add("ellipse", (5, 53, 23, 66), (120, 70, 190), in_mask=False)
        face.add("ellipse", (12, 72, 25, 82), (238, 120, 130), in_mask=False)
    if a["Eyeglasses"]:
        face.add("rectangle", (-8, 59, 8, 62), BLACK)
        face.add("ellipse", (3, 52, 25, 72), BLACK)
        face.add("ellipse", (6, 55, 22, 69), (175, 205, 225))
    face.add("rectangle", (7, 46, 21, 53) if a["Bushy_Eyebrows"] else (7, 49, 21, 50), brow)
    face.add("ellipse", (8, 57, 20, 66), WHITE)
    face.add("ellipse", (11, 57, 17, 66), (40, 40, 70))
    face.add("ellipse", (-4, 66, 4, 77), (150, 95, 75))
    # Mouth, mustache and hat
    if a["Smiling"]:
        face.add("chord", (-17, 70, 17, 97 if opened else 93), lips, start=10, end=170)
        if opened:
            face.add("chord", (-12, 76, 12, 93), WHITE, start=10, end=170)
    else:
        face.add("ellipse", (-9, 81, 9, 95 if opened else 87), lips)
        if opened:
            face.add("ellipse", (-6, 84, 6, 92), (70, 10, 20))
    if a["Mustache"]:
        face.add("rectangle", (-14, 77, 14, 82), brow, in_mask=False)
    if a["Wearing_Hat"]:
        face.add("rounded_rectangle", (-29, 4, 29, 40), hat, radius=10)
        face.add("rectangle", (-41, 34, 41, 42), hat)
    return shrink(face.canvas.convert("RGB"), face.canvas.getchannel("X"), size)


def synthetic_faces(size):
    """Return {split: {modality: uint8 (N, ...)}} of synthetic faces, the same in every run. "fresh"
    has further faces like those of "test"."""
    print("These faces are synthetic; --data CelebAMask-HQ uses real ones (see README.md).")
    data = {}
    for seed, (split, n) in enumerate(FACES.items()):
        rng = np.random.default_rng(seed)
        layers, attributes = [], []
        for _ in tqdm(range(n), f"rendering faces: {split}"):
            a = sample_attributes(rng)
            layers.append(render_face(a, rng, size))
            attributes.append(list(a.values()))
        data[split] = modalities(torch.from_numpy(np.stack(layers)), torch.tensor(attributes))
    return data


def shrink(image, mask, size):
    """Resize a PIL image and its mask to uint8 (size, size, 3 + 1); the mask becomes 0 or 1."""
    image, mask = (x.resize((size, size), Image.Resampling.BOX) for x in (image, mask))
    return np.dstack([np.asarray(image), np.asarray(mask) > 127])


def modalities(layers, attributes):
    """Return {modality: uint8 (N, ...)} for layers (N, H, W, 3 + 1) and attributes (N, 18)."""
    image, mask = layers.permute(0, 3, 1, 2).split([3, 1], dim=1)
    return {"image": image, "mask": mask, "attributes": attributes.byte()}


# ---- CelebAMask-HQ as released -------------------------------------------------------------------

SPLITS = {"train": range(162_770), "test": range(182_637, 202_599)}  # image numbers in CelebA
PARTS = """nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l
    neck cloth""".split()  # all parts of a face except the skin


def read_face(folder, k, size):
    """Return image and mask of face k, uint8 (size, size, 3 + 1). The mask is the union of all
    parts except the skin (§4.2)."""
    image = dm.open_image(folder / "CelebA-HQ-img" / f"{k}.jpg", "RGB")
    stem = folder / "CelebAMask-HQ-mask-anno" / f"{k // 2000}" / f"{k:05d}"
    paths = [Path(f"{stem}_{part}.png") for part in PARTS]
    layers = [np.asarray(dm.open_image(path, "L")) for path in paths if path.exists()]
    if not layers or any(0 < layer.max() < 128 for layer in layers):
        raise InputError(f"{stem}_*.png are missing or are not masks of 0 and 255: unpack them "
                         "again, or remove the face from the attribute file")
    return shrink(image, Image.fromarray(np.maximum.reduce(layers)), size)


def read_faces(folder, size):
    """Return {split: {modality: uint8 (N, ...)}} in CelebA's splits, without its validation faces.
    Images and masks are decoded once, then kept in a file next to them."""
    folder = Path(folder)
    path = folder / "CelebAMask-HQ-attribute-anno.txt"
    _, names, *rows = [line.split() for line in dm.read_lines(path)]
    missing = set(ATTRIBUTES) - set(names)
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: use the file as released")
    faces = [int(name.removesuffix(".jpg")) for name, *_ in rows]
    columns = [1 + names.index(name) for name in ATTRIBUTES]
    attributes = torch.tensor([[int(row[column]) > 0 for column in columns] for row in rows])
    _, *rows = [line.split() for line in dm.read_lines(folder / "CelebA-HQ-to-CelebA-mapping.txt")]
    origin = {int(k): int(number) for k, number, _ in rows}
    cache = folder / f"diffmvae-images-{size}.pt"
    layers = dm.decode_cached(cache, lambda k: read_face(folder, k, size), faces)
    data = {}
    for split, numbers in SPLITS.items():
        chosen = [row for row, k in enumerate(faces) if origin[k] in numbers]
        data[split] = modalities(layers[chosen], attributes[chosen])
    return data


# ---- The three modalities ------------------------------------------------------------------------

def get_batch(data, i=slice(None)):
    """Return examples i for the networks: images in [−1, 1], masks and attributes 0 or 1."""
    x = {name: value[i].float() for name, value in data.items()}
    return {name: value / 127.5 - 1 if name == "image" else value for name, value in x.items()}


def build(s):
    """Return the untrained model and latent prior for the settings s (§4.2)."""
    size, D = s.image_size, s.latent_dim
    encoder, decoder = dm.image_networks(s)
    base = s.encoder_channels // 2  # masks are simple
    encoders = {
        "image": encoder,
        "mask": dm.ConvEncoder(1, size, D, base),
        "attributes": dm.Encoder(dm.mlp(len(ATTRIBUTES), 256, 256, 2 * D)),
    }
    decoders = {
        "image": decoder,
        "mask": dm.FeedForwardDecoder(dm.ConvDecoder(1, size, D, base), dm.bernoulli),
        "attributes": dm.FeedForwardDecoder(dm.mlp(D, 256, 256, len(ATTRIBUTES)), dm.bernoulli),
    }
    weights, side = {"attributes": s.log_prob_weight}, math.isqrt(D)
    return dm.build_pair(s, encoders, decoders, weights, (side, side))


def load(out, device="cpu"):
    """Return the trained (model, prior) of the finished run in the folder out."""
    return dm.load_run(out, Settings, build, device)


# ---- Evaluation (Table 3), samples (Figures 5 and 6), and the run --------------------------------

NON_IMAGE = ["mask", "attributes"]
CONDITIONS = {"image": ["image"], "mask + attributes": NON_IMAGE, "mask": ["mask"],
              "attributes": ["attributes"]}  # what images are generated from
TARGETS = {**CONDITIONS, "image": NON_IMAGE}  # what the generated images should then show


def f1_score(predicted, actual):
    """Sample-average F1 (§4.2): 2 TP / (2 TP + FP + FN) for each example, 0 if both are empty.

    predicted, actual: (N, ...), bool, or probabilities, which are thresholded at ½.
    """
    predicted, actual = predicted.flatten(1) > 0.5, actual.flatten(1) > 0.5
    total = predicted.sum(1) + actual.sum(1)
    return (2 * (predicted & actual).sum(1) / total.clamp(min=1)).mean().item()


def table3(model, training, test):
    """Return the F1 of Table 3, {condition: {modality: score}}. The constant baseline is the mean
    of the training set, thresholded where that scores best on test."""
    x = get_batch(test)
    scores = {"image + other modality": {}, "image": {}, "constant baseline": {}}
    for target, other in (("attributes", "mask"), ("mask", "attributes")):
        conditions = {"image + other modality": ["image", other], "image": ["image"]}
        for label, condition in conditions.items():
            if set(condition) <= set(model.encoders):
                predicted = sample(model.decoders, target, encode_rows(model, x, condition))
                scores[label][target] = f1_score(predicted, test[target])
        mean = training[target].float().mean(0)
        constants = [(mean >= k / 20).expand(test[target].shape) for k in range(1, 20)]
        scores["constant baseline"][target] = max(f1_score(c, test[target]) for c in constants)
    return scores


def generate(path, model, x, prior=None, training=None):
    """Generate images for the examples x under CONDITIONS (§3.3) and, with the prior, also
    unconditionally (§3.4). Save ten of each (Figures 5 and 6). Return {condition: {modality:
    (n, ...)}}: the images and what they should agree with, the TARGETS of x or, for unconditional
    images, modalities decoded from the same z."""
    latents = {label: encode_rows(model, x, names) for label, names in CONDITIONS.items()}
    if prior is not None:
        latents.update(dm.unconditional_latents(model, prior, training))
    generated = {}
    for label, z in latents.items():
        decoded = ["image"] if label in TARGETS else ["image", *NON_IMAGE]
        generated[label] = {name: sample(model.decoders, name, z) for name in decoded}
        generated[label].update({name: x[name] for name in TARGETS.get(label, [])})
    rows = {"real masks": 2 * x["mask"][:10] - 1, "real": x["image"][:10]}
    rows.update({label: y["image"][:10] for label, y in generated.items()})
    dm.save_grid(path, rows)
    return generated


def evaluate(evaluator, generated, real):
    """Return evaluate_images with coherence, the F1 of the mask and attributes that the evaluator
    predicts for a generated image against those that the image should agree with."""
    def coherence(features, x):
        return {f"coherence_{name}": f1_score(sample(evaluator.decoders, name, features), x[name])
                for name in NON_IMAGE if name in x}

    return dm.evaluate_images(evaluator, generated, real, coherence)


def run(s):
    """Train the model and its prior; save samples.png and results.json."""
    evaluator = dm.load_evaluator(s, load)[0] if s.evaluator else None
    torch.manual_seed(s.seed)
    model, prior = build(s)
    data = read_faces(s.data, s.image_size) if s.data else synthetic_faces(s.image_size)
    data = {split: {k: x.to(s.device) for k, x in part.items()} for split, part in data.items()}
    train, test = data["train"], data["test"]

    def preview(ema_model):
        if s.decoder != "none":
            generate(Path(s.out) / "preview.png", ema_model, get_batch(test, slice(6)))

    model = dm.train_model(s, data, model, get_batch, preview)
    if prior is not None:
        prior = dm.train_prior(s, train, model, prior, get_batch)
    torch.manual_seed(s.seed)
    tables = {"f1": table3(model, train, test)}
    if s.is_bound:
        tables["elbo"] = dm.evaluate_elbo(model, test, get_batch)
    if prior is not None:
        first = slice(s.num_samples if evaluator else 10)
        x, training = get_batch(test, first), get_batch(train, slice(len(test["image"][first])))
        generated = generate(Path(s.out) / "samples.png", model, x, prior, training)
        if evaluator is not None:
            if "fresh" in data:
                generated["fresh"] = get_batch(data["fresh"], first)
            tables["images"] = evaluate(evaluator, generated, get_batch(test)["image"])
    dm.save_results(s, tables)


if __name__ == "__main__":
    dm.main(run, Settings, __doc__)
