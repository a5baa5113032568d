"""Diff-MVAE on CelebAMask-HQ (§4.2): a face's image, mask and attributes, each from any other.

    python train_celeba.py                          draws faces, 32 px: ten minutes on two cores
    python train_celeba.py --data CelebAMask-HQ     the released data, 128 px, for a GPU
    python train_celeba.py --data CelebAMask-HQ --small       the same at 64 px, hours on one core

Trains Diff-MVAE (§3.2), then the latent prior (§3.4), measures (Table 3), draws (Figures 5, 6).
The same command run again goes on where it stopped.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import diffmvae
from diffmvae import (
    ConvDecoder, ConvEncoder, Encoder, FeedForward, InputError, bernoulli, build_model, build_prior,
    check_judge, check_splits, conv_widths, decode_cached, f1_score, features, image_networks,
    infer, judged, load_run, main, mlp, nats, on_device, open_picture, read_lines, read_table,
    sample, save_grid, save_results, train, unconditional,
)

ATTRIBUTES = """Bald Bangs Black_Hair Blond_Hair Brown_Hair Bushy_Eyebrows Eyeglasses Gray_Hair
    Heavy_Makeup Male Mouth_Slightly_Open Mustache Pale_Skin Receding_Hairline Smiling Straight_Hair
    Wavy_Hair Wearing_Hat""".split()


class Settings(diffmvae.Settings):
    """Drawn faces train in minutes on a CPU; README.md says which of the real ones' settings are
    the paper's, its authors' or ours."""

    defaults = {  # drawn faces, CelebAMask-HQ, CelebAMask-HQ with --small
        **diffmvae.Settings.defaults,
        "out": ("runs/drawn", "runs/celeba", "runs/celeba-small"),
        "size": (32, 128, 64),
        "steps": (3200, 100_000, 20_000),
        "batch_size": (8, 64, 8),
        "latent_dim": (64, 256, 64),
        "channels": (32, 128, 24),
        "multipliers": ([1, 2], [1, 2, 2, 3, 4], [1, 2, 2]),
        "vae_rate": (1e-3, 2e-4, 1e-3),
    }
    surrogate_weight = 10.0


# ---- Drawn faces: the same attributes, all visible, and a mask with the same meaning -------------

FACES = {"train": 10_000, "test": 1_000, "anew": 1_000}
HAIR = {"Gray_Hair": (165, 165, 172), "Blond_Hair": (232, 196, 92), "Brown_Hair": (118, 72, 36),
        "Black_Hair": (28, 22, 24)}
RED = (178, 62, 36)
FORM = ["Straight_Hair", "Wavy_Hair"]
FRONT = ["Bangs", "Receding_Hairline"]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def draw_attributes(rng):
    """A plausible combination, {name: bool}, drawn from a numpy Generator."""
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
    """A square of 128 with x = 0 in the middle, (dx, dy) away from its corner; what is drawn right
    of the middle is mirrored. The fourth channel is the mask."""

    def __init__(self, background, dx, dy):
        self.canvas = Image.new("RGBX", (128, 128), (*background, 0))
        self.pen = ImageDraw.Draw(self.canvas)
        self.dx, self.dy = dx, dy

    def add(self, shape, box, colour, in_mask=True, **options):
        x0, y0, x1, y1 = box
        sides = [(x0, x1)]
        if x0 > 0:
            sides.append((-x1, -x0))
        for left, right in sides:
            place = (left + self.dx, y0 + self.dy, right + self.dx, y1 + self.dy)
            fill = (*colour, 255 if in_mask else 0)
            getattr(self.pen, shape)(place, fill=fill, **options)

    def shrunk(self, size):
        return shrunk(self.canvas.convert("RGB"), self.canvas.getchannel("X"), size)


def draw_face(a, rng, size):
    """Picture and mask, (size, size, 3 + 1), of a face with attributes a; the rest is rng's.

    From back to front. As in CelebAMask-HQ all but the skin, and what is on it, is in the mask.
    """
    def colour():
        return tuple(rng.integers(30, 226, 3).tolist())

    background, clothes, hat = [colour() for _ in range(3)]
    dx, dy = int(rng.integers(62, 67)), int(rng.integers(-2, 3))
    w = int(rng.integers(26, 31))
    tone, light = 0.55 + 0.45 * rng.random(), 0.9 + 0.2 * rng.random()
    skin = (250, 226, 214) if a["Pale_Skin"] else tuple(int(c * tone) for c in (214, 158, 116))
    hair = tuple(min(255, int(c * light)) for c in hair_colour(a))
    shade = tuple(int(0.8 * c) for c in skin)
    brow = tuple(c // 2 for c in hair)
    face = Sketch(background, dx, dy)
    draw_back(face, a, w, hair, clothes, shade)
    face.add("ellipse", (-w, 26, w, 102), skin, in_mask=False)
    if a["Male"]:
        face.add("rounded_rectangle", (2 - w, 62, w - 2, 103), skin, in_mask=False, radius=11)
    draw_front_hair(face, a, w, hair)
    draw_eyes(face, a, brow)
    face.add("ellipse", (-4, 66, 4, 77), (150, 95, 75))  # nose
    draw_mouth(face, a)
    if a["Mustache"]:
        face.add("rectangle", (-14, 77, 14, 82), brow, in_mask=False)
    if a["Wearing_Hat"]:
        face.add("rounded_rectangle", (-29, 4, 29, 40), hat, radius=10)
        face.add("rectangle", (-41, 34, 41, 42), hat)
    return face.shrunk(size)


def hair_colour(a):
    """Of the first colour that a has, or red."""
    for name, colour in HAIR.items():
        if a[name]:
            return colour
    return RED


def draw_back(face, a, w, hair, clothes, shade):
    """Hair behind the head, clothes, neck and ears; men are shorter of hair and broader."""
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


def draw_front_hair(face, a, w, hair):
    if not a["Bald"]:
        start, end = (222, 318) if a["Receding_Hairline"] else (200, 340)
        face.add("chord", (-w - 2, 20, w + 2, 84), hair, start=start, end=end)
    if a["Bangs"]:
        face.add("chord", (-w, 24, w, 84), hair, start=182, end=358)


def draw_eyes(face, a, brow):
    """Make-up, glasses, eyebrows and eyes."""
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


def draw_mouth(face, a):
    lips = (205, 20, 55) if a["Heavy_Makeup"] else (176, 88, 84)
    opened = a["Mouth_Slightly_Open"]
    if a["Smiling"]:
        face.add("chord", (-17, 70, 17, 97 if opened else 93), lips, start=10, end=170)
        if opened:
            face.add("chord", (-12, 76, 12, 93), WHITE, start=10, end=170)
    else:
        face.add("ellipse", (-9, 81, 9, 95 if opened else 87), lips)
        if opened:
            face.add("ellipse", (-6, 84, 6, 92), (70, 10, 20))


def draw_faces(size):
    """{split: {modality: uint8 (N, ...)}} of drawn faces, the same at every run; "anew" are as
    close to those of "test" as pictures can be."""
    print("These faces are drawn; --data CelebAMask-HQ takes real ones (see README.md).")
    data = {}
    for seed, (split, n) in enumerate(FACES.items()):
        rng = np.random.default_rng(seed)
        layers, attributes = [], []
        for _ in tqdm(range(n), f"drawing faces: {split}"):
            a = draw_attributes(rng)
            layers.append(draw_face(a, rng, size))
            attributes.append(list(a.values()))
        data[split] = modalities(torch.from_numpy(np.stack(layers)), torch.tensor(attributes))
    return data


def shrunk(picture, mask, size):
    """A PIL picture and its mask as uint8 (size, size, 3 + 1); the mask is 0 or 1."""
    picture, mask = (x.resize((size, size), Image.Resampling.BOX) for x in (picture, mask))
    return np.dstack([np.asarray(picture), np.asarray(mask) > 127])


def modalities(layers, attributes):
    """(N, H, W, 3 + 1) uint8 and (N, 18) bool -> {modality: uint8 (N, ...)}."""
    image, mask = layers.permute(0, 3, 1, 2).split([3, 1], dim=1)
    return {"image": image, "mask": mask, "attributes": attributes.byte()}


# ---- CelebAMask-HQ as released -------------------------------------------------------------------

SPLITS = {"train": range(162_770), "test": range(182_637, 202_599)}  # indices in CelebA, from 0
PARTS = """nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l
    neck cloth""".split()  # all but the skin


def read_face(folder, k, size):
    """Picture and mask, (size, size, 3 + 1), of face k; in the mask all parts but the skin are
    united (§4.2)."""
    picture = open_picture(folder / "CelebA-HQ-img" / f"{k}.jpg", "RGB")
    place = folder / "CelebAMask-HQ-mask-anno" / f"{k // 2000}"
    union = None
    for part in PARTS:
        path = place / f"{k:05d}_{part}.png"
        if not path.exists():
            continue
        layer = np.asarray(open_picture(path, "L"))
        if 0 < layer.max() < 128:
            raise InputError(f"{path} has no value above {layer.max()}: masks are 0 and 255")
        if union is not None and union.shape != layer.shape:
            raise InputError(f"{path} is of another size than the other parts: unpack it again")
        union = layer if union is None else np.maximum(union, layer)
    if union is None:
        raise InputError(f"{place} has no mask of picture {k}: unpack it again, or take the "
                         "picture out of the attribute file")
    return shrunk(picture, Image.fromarray(union), size)


def read_attributes(path):
    """{picture's number: [18 bools]} of the attribute file, which says which pictures there are."""
    lines = read_lines(path)
    names = lines[1].split() if len(lines) > 1 else []
    missing = [name for name in ATTRIBUTES if name not in names]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: take the file as released")
    meaning = {"1": True, "-1": False}

    def pair(name, *values):
        on = {a: meaning[value] for a, value in zip(names, values, strict=True)}
        return int(name.removesuffix(".jpg")), [on[a] for a in ATTRIBUTES]

    table = read_table(path, pair, header=2)
    if lines[0].split() != [str(len(table))]:
        raise InputError(f"{path} has {len(table)} faces, its first line says {lines[0]}: get it "
                         "anew")
    return table


def read_faces(folder, size):
    """{split: {modality: uint8 (N, ...)}}, decoded once, then cached there, in CelebA's own split;
    its validation faces are not used."""
    folder = Path(folder)
    anno = folder / "CelebAMask-HQ-attribute-anno.txt"
    mapping = folder / "CelebA-HQ-to-CelebA-mapping.txt"
    for path in (anno, mapping, folder / "CelebAMask-HQ-mask-anno", folder / "CelebA-HQ-img"):
        if not path.exists():
            raise InputError(f"{path} is missing: --data is the folder CelebAMask-HQ as released")
    known = read_attributes(anno)
    origin = read_table(mapping, lambda k, index, *_: (int(k), int(index)), 1, known)
    rows = {split: [row for row, k in enumerate(known) if origin[k] in indices]
            for split, indices in SPLITS.items()}
    check_splits(rows, anno)
    cache = folder / f"diffmvae-{size}.pt"
    layers = decode_cached(cache, lambda k: read_face(folder, k, size), list(known))
    attributes = torch.tensor(list(known.values()))
    return {split: modalities(layers[rows[split]], attributes[rows[split]]) for split in rows}


# ---- The three modalities ------------------------------------------------------------------------

def get_batch(data, i=slice(None)):
    """Examples i as the networks see them: pictures in [−1, 1], masks and attributes 0 or 1."""
    x = {name: value[i].float() for name, value in data.items()}
    if "image" in x:
        x["image"] = x["image"] / 127.5 - 1
    return x


def build(s):
    """The untrained model and latent prior for settings s (§4.2)."""
    D, side = s.latent_dim, math.isqrt(s.latent_dim)
    encoder, decoder = image_networks(s)
    narrow = [width // 2 for width in conv_widths(s)]  # masks are simple
    encoders = {
        "image": encoder,
        "mask": ConvEncoder(1, s.size, D, narrow),
        "attributes": Encoder(mlp(len(ATTRIBUTES), 256, 256, 2 * D)),
    }
    decoders = {
        "image": decoder,
        "mask": FeedForward(ConvDecoder(1, s.size, D, narrow), bernoulli),
        "attributes": FeedForward(mlp(D, 256, 256, len(ATTRIBUTES)), bernoulli),
    }
    model = build_model(s, encoders, decoders, {"attributes": s.label_weight})
    return model, build_prior(s, (side, side))


def load(out, device="cpu"):
    """(model, prior) that a finished run left in the folder out, ready to use."""
    return load_run(out, Settings, build, device)


# ---- Measuring (Table 3), drawing (Figures 5 and 6), and the run --------------------------------

OTHERS = ["mask", "attributes"]  # modalities than the image
GIVEN = {"image": ["image"], "mask + attributes": OTHERS, "mask": ["mask"],
         "attributes": ["attributes"]}  # what pictures are drawn from
SHOWN = {**GIVEN, "image": OTHERS}  # what these should then show


def table3(model, training, test):
    """Table 3's F1, {given: {modality: score}}; given nothing, the best that ignores its input: the
    training set's mean, cut where that scores best on test."""
    x = get_batch(test)
    scores = {"both others": {}, "the image": {}, "nothing": {}}
    for target, other in (("attributes", "mask"), ("mask", "attributes")):
        for label, given in (("both others", ["image", other]), ("the image", ["image"])):
            if set(given) <= set(model.encoders):
                predicted = sample(model.decoders[target], infer(model, x, given))
                scores[label][target] = f1_score(predicted, test[target])
        mean = training[target].float().mean(0)
        constants = [mean >= threshold / 20 for threshold in range(1, 20)]
        scores["nothing"][target] = max(
            f1_score(constant.expand(test[target].shape), test[target]) for constant in constants
        )
    return scores


def draw(path, model, x, prior=None, training=None):
    """A picture for each example of x given each of GIVEN (§3.3) and, with the prior, from nothing
    (§3.4), ten of each also as a PNG (Figures 5, 6): {given: {modality: (n, ...)}}. Beside the
    image stand the modalities to agree with it: those of SHOWN or, from nothing, what the same z is
    decoded to.
    """
    latents = {label: infer(model, x, given) for label, given in GIVEN.items()}
    if prior is not None:
        latents.update(unconditional(model, prior, training))
    made = {}
    for label, z in tqdm(latents.items(), path.stem, leave=False):
        if label in SHOWN:
            shown = {name: x[name] for name in SHOWN[label]}
        else:
            shown = {name: sample(model.decoders[name], z) for name in OTHERS}
        made[label] = {**shown, "image": sample(model.decoders["image"], z)}
    rows = {"real masks": 2 * x["mask"][:10] - 1, "real": x["image"][:10]}
    for label, parts in made.items():
        rows[label] = parts["image"][:10]
    save_grid(path, rows)
    return made


def pictures_table(judge, made, real):
    """judged, and the coherence of what draw made: F1 of the mask and attributes that the judge
    sees in a picture, against those to agree with it."""
    table = judged(judge, {label: parts["image"] for label, parts in made.items()}, real)
    for label, parts in made.items():
        seen = features(judge, parts["image"])
        for name in OTHERS:
            if name in parts:
                score = f1_score(sample(judge.decoders[name], seen), parts[name])
                table[label][f"coherence, {name}"] = score
    return table


def run(s):
    """Data, both stages of training, samples.png, the tables in results.json."""
    judge = None
    if s.judge:
        check_judge(s)
        judge, _ = load(s.judge, s.device)
    torch.manual_seed(s.seed)
    model, prior = build(s)
    data = on_device(read_faces(s.data, s.size) if s.data else draw_faces(s.size), s)
    test = data["test"]

    def preview(averaged):
        if s.decoder != "none":
            draw(Path(s.out) / "preview.png", averaged, get_batch(test, slice(6)))

    model, prior, seconds = train(s, data, model, prior, get_batch, preview)
    torch.manual_seed(s.seed)
    results = {"seconds": seconds, "tables": {"F1 given": table3(model, data["train"], test)}}
    if s.is_bound:
        results["tables"]["Eq. 5"] = nats(model, test, get_batch)
    if prior is not None:
        x = get_batch(test, slice(s.measured if s.judge else 10))
        as_many = slice(len(x["image"]))
        training = get_batch(data["train"], as_many)
        made = draw(Path(s.out) / "samples.png", model, x, prior, training)
    if judge is not None:
        others = {"drawn anew": get_batch(data["anew"], as_many)} if "anew" in data else {}
        table = pictures_table(judge, {**others, **made}, get_batch(test)["image"])
        results["tables"]["pictures given"] = table
    save_results(s, results)


if __name__ == "__main__":
    main(run, Settings, __doc__)
