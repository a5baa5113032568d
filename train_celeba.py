"""Diff-MVAE on CelebAMask-HQ (§4.2): a face's image, mask and attributes, each from any other.

    python train_celeba.py                         draws faces, 32 px: ten minutes on two cores
    python train_celeba.py --data CelebAMask-HQ    the released data, 128 px, the paper's settings

Trains Diff-MVAE (§3.2), then the latent prior (§3.4), measures (Table 3), draws (Figures 5, 6).
The same command run again goes on where it stopped.
"""

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from diffmvae import (
    STAGES, CalibratedGaussian, ConvDecoder, ConvEncoder, DiffMVAE, Diffusion, Encoder, FeedForward,
    InputError, LatentPrior, Options, ResidualMLP, UNet, bernoulli, f1_score, fit, frechet_distance, in_batches,
    main, mlp, option, read_checkpoint, sample_gaussian, save_checkpoint, save_grid, save_results,
    to_bytes,
)

ATTRIBUTES = """Bald Bangs Black_Hair Blond_Hair Brown_Hair Bushy_Eyebrows Eyeglasses Gray_Hair
    Heavy_Makeup Male Mouth_Slightly_Open Mustache Pale_Skin Receding_Hairline Smiling Straight_Hair
    Wavy_Hair Wearing_Hat""".split()
SPLITS = {"train": range(162_770), "test": range(182_637, 202_599)}  # indices in CelebA, from 0
PARTS = """nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l
    neck cloth""".split()  # all but the skin


@dataclass
class Settings(Options):
    """Drawn faces train in minutes on a CPU; for real ones defaults are the paper's or authors'."""

    out: str = option("runs/drawn", "folder for checkpoints, numbers and pictures", "runs/celeba")
    size: int = option(32, "side of the pictures in pixels", 128)
    steps: int = option(3200, "training steps of Diff-MVAE", 100_000)
    prior_steps: int = option(2000, "training steps of the latent prior", 10_000)
    prior_net: str = option("mlp", "network of the latent prior; unet: the paper's",
                            choices=("mlp", "unet"))
    prior_rate: float = option(2e-3, "learning rate of the latent prior", 1e-3)
    batch_size: int = option(8, "examples in a step", 64)
    weighting: str = option("velocity", "likelihood: Diff-MVAE, a bound; the others: Diff-MVAE*",
                            "simple", choices=tuple(Diffusion.samplers))
    family: str = option("mopoe", "which subsets are drawn", choices=("mopoe", "mvae", "mmvae"))
    decoder: str = option("diffusion", "of images; feedforward: baseline MoPoE*; none: Supervised",
                          choices=("diffusion", "feedforward", "none"))
    beta: float = option(None, "weight of the KL (default: 1 for a bound, or 0.01)")
    weight: float = option(None, "weight of log p(attributes|z) (default: 1 for a bound, or 10)")
    latent_dim: int = option(64, "dimensions of z, an even number squared", 256)
    patch: int = option(2, "side in pixels of what the UNet takes for one pixel", 1)
    channels: int = option(32, "channels of the UNets at their first level", 128)
    multipliers: int = option([1, 2], "their multiple at each level", [1, 2, 2, 3, 4], nargs="+")
    attention: int = option(0, "side at which the UNet attends, besides its middle", 16)
    dropout: float = option(0.0, "in the UNet", 0.1, most=1)
    encoder_channels: int = option(16, "channels of the encoders at half size", 64)
    rate: float = option(1e-3, "learning rate of the image decoder", 1e-4)
    vae_rate: float = option(1e-3, "learning rate of the encoders and other decoders", 2e-4)
    measured: int = option(256, "pictures generated of each kind for the tables", 6000, least=2)
    judge: str = option("", "folder of a Supervised run, by which generated pictures are measured")
    surrogate = dict(beta=0.01, weight=10.0)  # defaults where the loss is no bound; there all is 1
    free = Options.free | {"measured", "judge"}

    def __post_init__(self):
        super().__post_init__()
        diffusion = "Diff-MVAE" if self.weighting == "likelihood" else "Diff-MVAE*"
        kind = dict(diffusion=diffusion, feedforward="MoPoE*", none="Supervised")[self.decoder]
        alone = kind == "Supervised" or self.family == "mopoe"
        self.method = kind if alone else f"{kind}, {self.family}"
        self.is_bound = kind in ("Diff-MVAE", "MoPoE*")  # in nats
        usual = self.surrogate | ({"beta": 0.0} if kind == "Supervised" else {})
        for name, value in usual.items():
            if getattr(self, name) is None:
                setattr(self, name, 1.0 if self.is_bound else value)
        halvings = range(max(1, self.size.bit_length() - 3))  # in the image's encoder, down to 4 px
        self.widths = [self.encoder_channels * min(2**i, 8) for i in halvings]


# ---- Drawn faces: the same attributes, all visible, and a mask with the same meaning -------------

FACES = {"train": 10_000, "test": 1_000}
HAIR = {"Gray_Hair": (165, 165, 172), "Blond_Hair": (232, 196, 92), "Brown_Hair": (118, 72, 36),
        "Black_Hair": (28, 22, 24), "": (178, 62, 36)}  # none of the four: red
FORM, FRONT = ["Straight_Hair", "Wavy_Hair", ""], ["Bangs", "Receding_Hairline", ""]


def draw_attributes(rng):
    """A plausible combination, {name: bool}, drawn from a numpy Generator."""
    a = {name: bool(rng.random() < 0.35) for name in ATTRIBUTES}
    a["Male"] = bool(rng.random() < 0.5)
    for exclusive in (list(HAIR), FORM, FRONT):
        a |= dict.fromkeys(exclusive, False) | {str(rng.choice(exclusive)): True}
    without = (["Heavy_Makeup"] if a["Male"] else ["Mustache", "Bald"]) + FRONT * a["Wearing_Hat"]
    without += ["Wearing_Hat", *HAIR, *FORM, *FRONT] if a["Bald"] and a["Male"] else []
    return {name: a[name] and name not in without for name in ATTRIBUTES}


def draw_face(a, rng, size):
    """Picture and mask, (size, size, 3 + 1), of a face with attributes a; the rest is rng's.

    Its shapes go from back to front on a square of 128 with x = 0 in the middle; those right of it
    are mirrored. As in CelebAMask-HQ all but the skin, and what is on it, belongs to the mask.
    """
    background, clothes, hat = (tuple(rng.integers(30, 226, 3).tolist()) for _ in range(3))
    dx, dy, w = (int(rng.integers(*ends)) for ends in ((62, 67), (-2, 3), (26, 31)))
    tone, light = 0.55 + 0.45 * rng.random(), 0.9 + 0.2 * rng.random()
    skin = (250, 226, 214) if a["Pale_Skin"] else tuple(int(c * tone) for c in (214, 158, 116))
    colour = next(colour for name, colour in HAIR.items() if not name or a[name])
    hair = tuple(min(255, int(c * light)) for c in colour)
    man, bald, smile, opened = a["Male"], a["Bald"], a["Smiling"], a["Mouth_Slightly_Open"]
    end, shoulder, neck, corner = (68, 47, 18, 10) if man else (108, 35, 10, 24)
    shade, brow = tuple(int(0.8 * c) for c in skin), tuple(c // 2 for c in hair)
    black, white = (0, 0, 0), (255, 255, 255)
    lips = (205, 20, 55) if a["Heavy_Makeup"] else (176, 88, 84)
    top = dict(start=222, end=318) if a["Receding_Hairline"] else dict(start=200, end=340)
    bushy, grin, bend = a["Bushy_Eyebrows"], dict(start=10, end=170), dict(radius=corner)
    shapes = [  # (when, in_mask, shape, box, colour, options)
        (not bald, 1, "ellipse", (-w - 7, 17, w + 7, 82), hair, {}),
        (a["Straight_Hair"], 1, "rectangle", (w - 6, 46, w + 9, end), hair, {}),
        *((a["Wavy_Hair"], 1, "ellipse", (w - 6 + y % 8, y, w + 9 + y % 8, y + 15), hair, {})
          for y in range(26, end - 8, 12)),
        (True, 1, "rounded_rectangle", (-shoulder, 106, shoulder, 150), clothes, bend),
        (True, 1, "rectangle", (-neck, 86, neck, 111), shade, {}),
        (True, 1, "ellipse", (w - 3, 56, w + 6, 74), shade, {}),  # ears
        (True, 0, "ellipse", (-w, 26, w, 102), skin, {}),
        (man, 0, "rounded_rectangle", (2 - w, 62, w - 2, 103), skin, dict(radius=11)),  # jaw
        (not bald, 1, "chord", (-w - 2, 20, w + 2, 84), hair, top),
        (a["Bangs"], 1, "chord", (-w, 24, w, 84), hair, dict(start=182, end=358)),
        (a["Heavy_Makeup"], 0, "ellipse", (5, 53, 23, 66), (120, 70, 190), {}),
        (a["Heavy_Makeup"], 0, "ellipse", (12, 72, 25, 82), (238, 120, 130), {}),
        (a["Eyeglasses"], 1, "rectangle", (-8, 59, 8, 62), black, {}),
        (a["Eyeglasses"], 1, "ellipse", (3, 52, 25, 72), black, {}),
        (a["Eyeglasses"], 1, "ellipse", (6, 55, 22, 69), (175, 205, 225), {}),
        (True, 1, "rectangle", (7, 46, 21, 53) if bushy else (7, 49, 21, 50), brow, {}),
        (True, 1, "ellipse", (8, 57, 20, 66), white, {}),
        (True, 1, "ellipse", (11, 57, 17, 66), (40, 40, 70), {}),
        (True, 1, "ellipse", (-4, 66, 4, 77), (150, 95, 75), {}),  # nose
        (smile, 1, "chord", (-17, 70, 17, 97 if opened else 93), lips, grin),
        (smile and opened, 1, "chord", (-12, 76, 12, 93), white, grin),
        (not smile, 1, "ellipse", (-9, 81, 9, 95 if opened else 87), lips, {}),
        (not smile and opened, 1, "ellipse", (-6, 84, 6, 92), (70, 10, 20), {}),
        (a["Mustache"], 0, "rectangle", (-14, 77, 14, 82), brow, {}),
        (a["Wearing_Hat"], 1, "rounded_rectangle", (-29, 4, 29, 40), hat, dict(radius=10)),
        (a["Wearing_Hat"], 1, "rectangle", (-41, 34, 41, 42), hat, {}),
    ]
    canvas = Image.new("RGBX", (128, 128), (*background, 0))  # the fourth channel is the mask
    pen = ImageDraw.Draw(canvas)
    for when, in_mask, shape, (x0, y0, x1, y1), fill, options in shapes:
        for left, right in [(x0, x1), (-x1, -x0)][: when * (1 + (x0 > 0))]:
            box = (left + dx, y0 + dy, right + dx, y1 + dy)
            getattr(pen, shape)(box, fill=(*fill, 255 * in_mask), **options)
    return shrunk([canvas.convert("RGB"), canvas.getchannel("X")], size)


def draw_faces(size):
    """{split: {modality: uint8 (N, ...)}} of drawn faces, the same at every run."""
    print("These faces are drawn; --data CelebAMask-HQ takes real ones (see README.md).")
    data = {}
    for k, (split, n) in enumerate(FACES.items()):
        rng = np.random.default_rng(k)
        drawn = (draw_attributes(rng) for _ in tqdm(range(n), f"drawing faces to {split}"))
        layers, attributes = zip(*((draw_face(a, rng, size), list(a.values())) for a in drawn))
        data[split] = modalities(torch.from_numpy(np.stack(layers)), torch.tensor(attributes))
    return data


def shrunk(layers, size):
    """A PIL picture and its mask as uint8 (size, size, 3 + 1); the mask is 0 or 1."""
    picture, mask = (np.asarray(x.resize((size, size), Image.Resampling.BOX)) for x in layers)
    return np.dstack([picture, mask > 127])


def modalities(layers, attributes):
    """(N, H, W, 3 + 1) uint8 and (N, 18) bool -> {modality: uint8 (N, ...)}."""
    image, mask = layers.permute(0, 3, 1, 2).split([3, 1], dim=1)
    return {"image": image, "mask": mask, "attributes": attributes.byte()}


# ---- CelebAMask-HQ as released -------------------------------------------------------------------

def read_table(path, pair, header=0, keys=()):
    """{key: value}, each pair(*words) of a line after the header; with all these keys, if given."""
    table = {}
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        try:
            if number > header and line.strip():
                table |= [pair(*line.split())]
        except (TypeError, ValueError, KeyError):  # words too many, too few, or others
            raise InputError(f"{path}, line {number} ({line[:40]}) is not as released: get it anew")
    if missing := set(keys) - table.keys():
        raise InputError(f"{path} lacks picture {min(missing)}: unpack it again")
    return table


def open_picture(path, mode):
    """The PIL image in a file, decoded."""
    try:
        return Image.open(path).convert(mode)
    except OSError as problem:
        raise InputError(f"{path} cannot be read ({problem}): unpack it again") from problem


def read_face(folder, k, size):
    """Picture and mask, (size, size, 3 + 1), of face k: all parts but the skin united (§4.2)."""
    masks = folder / "CelebAMask-HQ-mask-anno" / f"{k // 2000}"
    parts = [path for part in PARTS if (path := masks / f"{k:05d}_{part}.png").exists()]
    if not parts:
        raise InputError(f"{masks} has no mask of picture {k}: unpack it again")
    union = np.maximum.reduce([np.asarray(open_picture(path, "L")) for path in parts])
    picture = open_picture(folder / "CelebA-HQ-img" / f"{k}.jpg", "RGB")
    return shrunk([picture, Image.fromarray(union)], size)


def decoded(cache, read, names):
    """[read(name) for each name], in threads; kept in the file cache and taken from there."""
    kept = read_checkpoint(cache) if cache.exists() else {}
    if kept.get("names") != names:
        with ThreadPoolExecutor() as pool:
            arrays = list(tqdm(pool.map(read, names), "decoding pictures", len(names)))
        kept = {"names": names, "arrays": torch.from_numpy(np.array(arrays))}
        save_checkpoint(cache, kept)
    return kept["arrays"]


def read_faces(folder, size):
    """{split: {modality: uint8 (N, ...)}}, decoded once, then cached there; CelebA's own split."""
    folder = Path(folder)
    anno, mapping = (folder / f"{name}.txt" for name in
                     ("CelebAMask-HQ-attribute-anno", "CelebA-HQ-to-CelebA-mapping"))
    for path in (anno, mapping, folder / "CelebAMask-HQ-mask-anno", folder / "CelebA-HQ-img"):
        if not path.exists():
            raise InputError(f"{path} is missing: --data is the folder CelebAMask-HQ as released")
    names = [*anno.read_text("utf-8", "replace").splitlines(), "", ""][1].split()
    if missing := [name for name in ATTRIBUTES if name not in names]:
        raise InputError(f"{anno} lacks {', '.join(missing)}: take the file as released")

    def pair(name, *values):
        on = dict(zip(names, ({"1": True, "-1": False}[value] for value in values), strict=True))
        return int(name.removesuffix(".jpg")), [on[a] for a in ATTRIBUTES]

    known = read_table(anno, pair, header=2)  # it says which pictures there are
    origin = read_table(mapping, lambda k, i, *_: (int(k), int(i)), 1, known)  # index in CelebA
    layers = decoded(folder / f"diffmvae-{size}.pt", lambda k: read_face(folder, k, size), [*known])
    data, attributes = {}, torch.tensor(list(known.values()))
    for split, indices in SPLITS.items():
        chosen = torch.tensor([origin[k] in indices for k in known])
        if not chosen.any():
            raise InputError(f"{anno} lists no picture of CelebA's {split} split: get it anew")
        data[split] = modalities(layers[chosen], attributes[chosen])
    return data


# ---- The three modalities, and both stages of training ------------------------------------------

OTHERS = ("mask", "attributes")  # than the image


def batch(data, i=slice(None)):
    """Examples i as the networks see them: pictures in [−1, 1], masks and attributes 0 or 1."""
    return {k: x[i] / 127.5 - 1 if k == "image" else x[i].float() for k, x in data.items()}


def image_networks(s):
    """The image's encoder and its decoder of the kind s.decoder, for settings s, from its seed."""
    torch.manual_seed(s.seed)
    D, size, least = s.latent_dim, s.size, math.lcm(8, s.patch << len(s.multipliers) - 1)
    if size % least or size & size - 1:
        raise InputError(f"--size {size} --patch {s.patch}: give a power of 2 that {least} divides")
    if s.channels % 8 or s.encoder_channels % 2:
        raise InputError(f"--channels {s.channels} --encoder-channels {s.encoder_channels}: "
                         "give a multiple of 8 and an even number")
    decoder = None
    if s.decoder == "feedforward":
        decoder = FeedForward(ConvDecoder(3, size, D, s.widths), CalibratedGaussian())
    elif s.decoder == "diffusion":
        sides = [size // s.patch >> k for k in range(len(s.multipliers))]
        if s.attention not in (0, *sides):
            raise InputError(f"--attention {s.attention}: give 0 or one of {sides}")
        levels = [k for k, side in enumerate(sides) if side == s.attention]
        unet = UNet(2, 3, size, s.channels, s.multipliers, 2, levels, 8, s.dropout, D, s.patch)
        decoder = Diffusion(unet, (3, size, size), weighting=s.weighting)
    return ConvEncoder(3, size, D, s.widths), decoder


def build(s):
    """The untrained model and latent prior for settings s (§4.2); Supervised has no prior."""
    D, n, side = s.latent_dim, len(ATTRIBUTES), math.isqrt(s.latent_dim)
    if side**2 != D or side % 2:
        raise InputError(f"--latent-dim {D}: give an even number squared, as 64 or 256")
    encoder, decoder = image_networks(s)
    narrow = [width // 2 for width in s.widths]  # masks are simple
    encoders = {"image": encoder, "mask": ConvEncoder(1, s.size, D, narrow),
                "attributes": Encoder(mlp(n, 256, 256, 2 * D))}
    decoders = {"image": decoder, "mask": FeedForward(ConvDecoder(1, s.size, D, narrow), bernoulli),
                "attributes": FeedForward(mlp(D, 256, 256, n), bernoulli)}
    if not decoder:
        encoders, decoders = {"image": encoder}, {k: decoders[k] for k in OTHERS}
    model = DiffMVAE(encoders, decoders, s.family, s.beta, {"attributes": s.weight})
    return model, latent_prior(s, (side, side)) if decoder else None


def latent_prior(s, sides):
    """The untrained latent prior (§3.4); the paper's UNet has the latents laid out on sides."""
    if s.prior_net == "unet":
        return LatentPrior(UNet(len(sides), 1, sides[0], s.channels, (1, 2)), (1, *sides))
    return LatentPrior(ResidualMLP(s.latent_dim, 256, 4), (s.latent_dim,))


def train(s, data, pair, batch, draw):
    """Diff-MVAE (§3.2), then the latent prior (§3.4): both, averaged, and their seconds."""
    model, prior = (part and part.to(s.device, memory_format=torch.channels_last) for part in pair)
    rate = lambda part: s.rate if isinstance(part, Diffusion) else s.vae_rate
    rates = [(part, rate(part)) for part in [model.encoders, *model.decoders.values()]]
    objective = "ELBO" if s.is_bound and s.beta == s.weight == 1 else "surrogate"
    terms = lambda i: model.elbo(batch(data, i)).terms(objective)
    preview = lambda averaged: draw(Path(s.out) / "preview.png", averaged, batch(data, slice(6)))
    n = len(data["image"])
    model, seconds = fit(model, terms, n, "model", s, rates, preview if prior else None)
    if not prior:
        return model, None, {"model": seconds}
    torch.manual_seed(s.seed)
    mu, logvar = in_batches(lambda x: model.posterior(batch(x)), data, "encoding")  # (N, D)
    prior.standardise(mu, logvar)
    terms = lambda i: {"surrogate": prior.log_prob(sample_gaussian(mu[i], logvar[i]))}
    prior, prior_seconds = fit(prior, terms, n, "prior", s, [(prior, s.prior_rate)])
    return model, prior, {"model": seconds, "prior": prior_seconds}


def load(out, device="cpu", settings=Settings, build=build):
    """(model, prior) that a finished run left in the folder out, ready to use."""
    pair = build(settings(**read_checkpoint(Path(out) / "model.pt")["settings"], device=device))
    for stage, part in zip(STAGES, filter(None, pair)):
        saved = read_checkpoint(Path(out) / f"{stage}.pt")
        if saved["step"] < saved["settings"]["steps" if stage == "model" else "prior_steps"]:
            raise InputError(f"{out} is not finished: run it again")
        part.load_state_dict(saved["averaged"])
        part.to(device).eval().requires_grad_(False)
    return pair


def load_judge(s):
    """The Supervised model in the folder s.judge, which must know pictures such as those of s."""
    was = read_checkpoint(Path(s.judge) / "model.pt")["settings"]
    if [was["decoder"], was["data"], was["size"]] != ["none", s.shared("model")["data"], s.size]:
        raise InputError(f"--judge {s.judge} is no run of --decoder none on this --data and --size")
    return load(s.judge, s.device)[0]


# ---- Measuring (Table 3), drawing (Figures 5 and 6), and the run --------------------------------

GIVEN = ["image", "mask + attributes", "mask", "attributes"]  # what pictures are drawn from


def infer(model, x, given):
    """z ~ q(z|x_o), x_o the given modalities of x (§3.3): (N, D)."""
    observed = {name: x[name] for name in given}
    return in_batches(lambda o: [sample_gaussian(*model.posterior(o))], observed, "encoding")[0]


def sample(decoder, z):
    """One x ~ p(x|z) for each row of z, in batches."""
    return in_batches(lambda rows: [decoder.sample(rows["z"])], {"z": z}, "sampling")[0]


def unconditional(model, prior, training):
    """As many rows of z as training has examples, without looking at any x: {label: (n, D)}.

    From the latent prior (§3.4), from N(0, I) without it, and, as the ceiling of both, from what
    the prior imitates, the aggregate posterior: z ~ q(z|x) given all of training examples.
    """
    ceiling = infer(model, training, list(model.encoders))
    z = in_batches(lambda b: [prior.sample(len(b["z"]))], {"z": ceiling}, "sampling z")[0]
    return {"aggregate posterior": ceiling, "latent prior": z, "N(0, I)": torch.randn_like(z)}


def table3(model, train, test):
    """Table 3's F1, {given: {modality: score}}; given nothing, the best that ignores its input: a
    thresholded mean over the training set."""
    scores, x = {"both others": {}, "the image": {}, "nothing": {}}, batch(test)
    for target, other in (("attributes", "mask"), ("mask", "attributes")):
        for label, given in (("both others", ["image", other]), ("the image", ["image"])):
            if set(given) <= set(model.encoders):
                predicted = sample(model.decoders[target], infer(model, x, given))
                scores[label][target] = f1_score(predicted, test[target])
        mean, thresholds = train[target].float().mean(0), torch.linspace(0.05, 0.95, 19).tolist()
        constants = ((mean >= p).expand(test[target].shape) for p in thresholds)
        scores["nothing"][target] = max(f1_score(constant, test[target]) for constant in constants)
    return scores


def judged(judge, made, real):
    """What Supervised says of the pictures that draw made, {given: {measure: value}}.

    Fréchet distance: to real pictures (N, ...), of its features, the means of q(z|image).
    Sharpness, to which these are nearly blind: the energy of the gradient over that of real ones.
    Coherence: F1 of the mask and attributes it sees in a picture, against what that should show.
    """
    see = lambda x: in_batches(judge.posterior, {"image": x}, "judging")[0]  # (N, D)
    energy = lambda x: sum(x.diff(dim=d).square().mean().item() for d in (2, 3))
    features, sharp, table = see(real), energy(real), {}
    for given, (pictures, shown) in made.items():
        seen = see(pictures := pictures.clamp(-1, 1))
        row = {"Fréchet distance": frechet_distance(seen, features)}
        row["sharpness"] = energy(pictures) / sharp
        said = {k: sample(judge.decoders[k], seen) for k in OTHERS if k in shown}
        table[given] = row | {f"coherence, {k}": f1_score(said[k], shown[k]) for k in said}
    return table


def nats(model, test):
    """Eq. 5's terms averaged over test, and the image's in bits per dimension."""
    terms = in_batches(lambda x: model.full_elbo(batch(x)).terms().values(), test, "ELBO")
    named = dict(zip(["ELBO", *model.decoders, "KL"], (term.mean().item() for term in terms)))
    bits = named["image"] / test["image"][0].numel() / math.log(2)  # of a density on [−1, 1],
    named["image, bits per dimension"] = math.log2(127.5) - bits  # where a grey level is 1/127.5
    return {term: {"nats": value} for term, value in named.items()}


def draw(path, model, x, prior=None, training=None):
    """A picture for each example of x from each of GIVEN (§3.3) and, with the prior, from nothing
    (§3.4), ten of each also as a PNG (Figures 5, 6): {given: (pictures, shown)}. shown are the
    modalities to agree with: those given or, from nothing, what the same z is decoded to.
    """
    z = {given: infer(model, x, given.split(" + ")) for given in GIVEN}
    if prior:
        z |= unconditional(model, prior, training)
    made = {"real": (x["image"], x)}
    for label, rows in tqdm(z.items(), path.stem, leave=False):
        if label in GIVEN:
            shown = x if label == "image" else {k: x[k] for k in label.split(" + ")}
        else:
            shown = {k: sample(model.decoders[k], rows) for k in OTHERS}
        made[label] = sample(model.decoders["image"], rows), shown
    rows = {"real masks": 2 * x["mask"] - 1} | {label: row for label, (row, _) in made.items()}
    save_grid(path, {label: row[:10] for label, row in rows.items()})
    return made


def export(folder, made):
    """The pictures that draw made as folder/label/00000.png, for FID (Table 3) by pytorch-fid."""
    for label, (pictures, _) in made.items():
        place = Path(folder) / "-".join(re.findall(r"\w+", label))
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("[0-9]" * 5 + ".png"):  # of a longer export before
            old.unlink()
        for k, pixels in enumerate(tqdm(to_bytes(pictures), f"writing {place}", leave=False)):
            Image.fromarray(pixels).save(place / f"{k:05d}.png")


def show(tables):
    """Print {title: {row: {column: number, or one for each seed}}} in Markdown."""
    error = lambda v: f" ± {np.std(v, ddof=1):.3f}" if np.size(v) > 1 else ""
    for title, table in tables.items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, row in table.items():
            cells = (f"{np.mean(row[k]):.3f}{error(row[k])}" if k in row else "" for k in columns)
            print(f"| {name} | {' | '.join(cells)} |")


def report(options):
    """The tables of the runs options.report: {measure: {method: {given: one number a seed}}}."""
    tables, first = {}, {}
    for path in (Path(out) / "results.json" for out in options.report):
        try:
            record = json.loads(path.read_text())
            s, found = type(options)(**record["settings"]), record["tables"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise InputError(f"{path} is missing or no run of this script: run it") from problem
        own = s.shared("prior") | {"seed": None}
        alike = {"--data or --size": [own["data"], s.size], f"more than {s.method}'s --seed": own}
        alike |= {"--judge or --measured": [s.judge, s.measured]} if s.judge else {}
        for what, value in alike.items():
            if first.setdefault(what, value) != value:
                raise InputError(f"{path} differs from a run before it in {what}: leave it out")
        if first.setdefault((s.method, s.seed), path) is not path:
            raise InputError(f"{path} is one more {s.method} of --seed {s.seed}: leave it out")
        for title, table in found.items():
            for given, row in table.items():
                for measure, value in row.items():
                    methods = tables.setdefault(f"{title}: {measure}", {})
                    methods.setdefault(s.method, {}).setdefault(given, []).append(value)
    return tables


def run(s):
    """Data, both stages of training, the tables on the screen, results.json, samples.png."""
    if s.report:
        return show(report(s))
    if s.decoder == "none" and (s.judge or s.export):
        raise InputError("--decoder none draws no pictures: leave out --judge and --export")
    judge = load_judge(s) if s.judge else None
    pair, data = build(s), read_faces(s.data, s.size) if s.data else draw_faces(s.size)
    data = {split: {k: x.to(s.device) for k, x in part.items()} for split, part in data.items()}
    model, prior, seconds = train(s, data["train"], pair, batch, draw)
    torch.manual_seed(s.seed)
    test, made = data["test"], {}
    tables = {"F1 given": table3(model, data["train"], test)}
    results = {"seconds": seconds, "tables": tables}
    if s.is_bound:
        tables["Eq. 5"] = nats(model, test)
    if prior:
        n, started = slice(s.measured if judge or s.export else 10), time.monotonic()
        x, training = batch(test, n), batch(data["train"], n)
        made = draw(Path(s.out) / "samples.png", model, x, prior, training)
        drawn = len(x["image"]) * (len(made) - 1)
        results["images sampled per second"] = drawn / (time.monotonic() - started)
    if judge:
        tables["pictures given"] = judged(judge, made, batch(test)["image"])
    show(tables)
    save_results(s, results)
    if s.export:
        export(s.export, made)


if __name__ == "__main__":
    main(run, Settings, __doc__)
