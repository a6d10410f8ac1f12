"""Image files: MNIST, CIFAR-10, ImageNet-64 and one's own, whole, odd and damaged."""
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Images, Shared, UserError, load_data


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def load(data, where=".", **flags):
    return load_data(Shared(data=data, data_dir=str(where), device="cpu", **flags))


def refused(words, data, where=".", **flags):
    """It ends in one sentence with these words."""
    with pytest.raises(UserError, match=words) as e:
        load(data, where, **flags)
    assert "\n" not in str(e.value) and "--data_dir" in str(e.value) and len(str(e.value)) < 600


def picture(image, kind="PNG"):
    """The bytes of a picture file of image (C, H, W)."""
    raw = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(raw, kind)
    return raw.getvalue()


def write_folder(folder, images, names):
    for image, name in zip(images, names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(image))


def write_zip(path, images, labels=(), junk=False):
    """EDM's zip: NNNNN/imgNNNNNNNN.png; labels None is its null, () no dataset.json."""
    names = [f"{i // 5:05d}/img{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as z:
        for image, name in zip(images, names):
            z.writestr(name, picture(image))
            if junk:
                z.writestr(f"__MACOSX/{name.replace('img', '._img')}", b"junk")
        if labels is None or len(labels):
            pairs = labels and [[name, int(k)] for name, k in zip(names, labels)][::-1]
            z.writestr("dataset.json", json.dumps(dict(labels=pairs)))


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Nothing is downloaded in tests; this is what would have been."""
    urls = []
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda url, *_: urls.append(url))
    return urls


@pytest.mark.parametrize("flip", [False, True])
def test_samples(flip):
    """In [-1, 1], as stored or, with --flip alone, half of them mirrored; with their own label."""
    images, labels = random_images(20, 3, 8, 8), np.arange(20)
    x, label = Images(images, labels, flip=flip).sample(400)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    place = {image.tobytes(): (k, False) for k, image in enumerate(images)}
    place |= {image[:, :, ::-1].tobytes(): (k, True) for k, image in enumerate(images)}
    seen = [place[image.numpy().tobytes()] for image in common.to_uint8(x)]
    assert [k for k, _ in seen] == label.argmax(1).tolist() and len({k for k, _ in seen}) == 20
    assert abs(sum(mirrored for _, mirrored in seen) / 400 - 0.5 * flip) < 0.1


@pytest.mark.parametrize("folder, zipped", [(".", False), ("mnist", True)])
def test_mnist(folder, zipped):
    """The idx files' headers have 16 and 8 bytes; gzipped or not, in --data_dir or in mnist/."""
    images, labels = random_images(30, 1, 28, 28), np.arange(30, dtype=np.uint8) % 10
    Path(folder).mkdir(exist_ok=True)
    for name, raw in (("train-images-idx3-ubyte", bytes(16) + images.tobytes()),
                      ("train-labels-idx1-ubyte", bytes(8) + labels.tobytes())):
        path = Path(folder, name + ".gz" * zipped)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    data = load("mnist", cond=True)
    assert np.array_equal(data.images, images) and np.array_equal(data.labels, labels)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused("--data_dir", "mnist")
    raw = raw[:-1] + b"\n"                              # the last label is 10
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    refused("class number", "mnist")


def write_cifar(folder, inside="cifar-10-batches-bin", label=0):
    """Rows of CIFAR-10's five files, here of 20 random images each, and in FOLDER.tar.gz."""
    rows = random_images(5, 20, 3073)
    rows[:, :, 0] %= 10
    rows[3, 3, 0] += label
    Path(folder, inside).mkdir(parents=True)
    for i in range(5):
        Path(folder, inside, f"data_batch_{i + 1}.bin").write_bytes(rows[i].tobytes())
    with tarfile.open(f"{folder}.tar.gz", "w:gz") as tar:
        tar.add(f"{folder}/{inside}", inside)
    return rows.reshape(-1, 3073)


@pytest.mark.parametrize("where", ["d", "d/cifar-10-batches-bin", "d.tar.gz", "mine.zip"])
def test_cifar10(where):
    """The folder, the archive under any name, which is not unpacked, and EDM's zip."""
    rows = write_cifar("d")
    write_zip("mine.zip", rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].tolist())
    data = load("cifar10", where, cond=True)
    assert np.array_equal(data.images.flatten(1), rows[:, 1:])
    assert np.array_equal(data.labels, rows[:, 0]) and data.label_dim == 10
    assert load("cifar10", where).sample(2)[1] is None and not Path("cifar-10-batches-bin").exists()


def test_wrong_cifar10():
    """Cut off, foreign, a label over 9, a file that lacks, no files."""
    write_cifar("cut")
    Path("cut.tar.gz").write_bytes(Path("cut.tar.gz").read_bytes()[:200_000])
    Path("page.tar.gz").write_text("<html>not found</html>")
    write_cifar("label", label=20)
    write_cifar("lacks")
    Path("lacks/cifar-10-batches-bin/data_batch_2.bin").unlink()
    for where, words in {"cut.tar.gz": "binary", "page.tar.gz": "binary", "label": "class number",
                         "lacks": "batch_2.bin", "nowhere": "nothing"}.items():
        refused(words, "cifar10", where)


def test_no_download_into_a_folder_of_the_users(asked):
    """A folder of PNGs is no place for 162 MB."""
    write_folder("pngs", random_images(1, 1, 28, 28), ["a.png"])
    for data in ("mnist", "cifar10", "imagenet64"):
        refused("--data_dir", data, "pngs")
    assert not asked and [p.name for p in Path("pngs").iterdir()] == ["a.png"]


def write_batches(sizes=(5, 7), lowest=1):
    """train_data_batch_<i>.npz in the official layout; images (N, 3, 64, 64), labels from 1."""
    images, labels = random_images(sum(sizes), 3, 64, 64), np.arange(sum(sizes)) * 83 + lowest
    for i, end in enumerate(np.cumsum(sizes)):
        part = slice(end - sizes[i], end)
        np.savez(f"train_data_batch_{i + 1}.npz", data=images[part].reshape(-1, 12288),
                 labels=labels[part])
    return images, labels


def test_imagenet_batches_in_edms_order():
    """map_clsloc.txt has all synsets, in another order than EDM's, which is sorted."""
    synsets = [f"n{number:08d}" for number in np.random.default_rng(1).permutation(1000)]
    lines = [f"{synset} {i + 1} kit_fox\n" for i, synset in enumerate(synsets)]
    images, labels = write_batches()
    refused("map_clsloc.txt", "imagenet64", cond=True, teacher="edm.pkl")
    Path("map_clsloc.txt").write_text("".join(lines) + " \n")    # a blank line does no harm
    data = load("imagenet64", cond=True, teacher="edm.pkl")
    assert np.array_equal(data.images, images) and data.label_dim == 1000
    assert data.labels.tolist() == [sorted(synsets).index(synsets[k - 1]) for k in labels]
    Path("map_clsloc.txt").write_text("".join(lines[:2]))
    refused("mapped", "imagenet64", cond=True)
    write_batches(lowest=900)
    refused("not 1 to 1000", "imagenet64")


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).iterdir()}


def test_imagenet_as_edms_zip():
    """Read into a memory map once; the user's own files are neither touched nor added to."""
    images, labels = random_images(12, 3, 64, 64), list(range(0, 996, 83))
    Path("mine").mkdir()
    write_zip("mine/imagenet.zip", images, labels)
    Path("mine/imagenet.npy").write_text("mine")
    before = contents("mine")
    for _ in range(2):
        data = load("imagenet64", "mine/imagenet.zip", cond=True)
        assert np.array_equal(data.images, images) and data.labels.tolist() == labels
    assert before == contents("mine") and len(contents("runs")) == 1


def test_changed_files_are_read_again():
    for color in (3, 200):
        write_folder("own", np.full((2, 1, 8, 8), color, np.uint8), ["a.png", "b.png"])
        assert set(load("images", "own").images.flatten().tolist()) == {color}


def test_wrong_imagenet():
    """Nothing there, labels that are not 1 to 1000, of another number, another size, cut off."""
    refused("train_data_batch_1.npz", "imagenet64")
    for lowest in (0, 500):
        write_batches(lowest=lowest)
        refused("1 to 1000|index", "imagenet64")
    write_batches()
    for size, n in ((3072, 4), (12288, 3), (12288, 5)):
        np.savez("train_data_batch_2.npz", data=random_images(4, size), labels=np.ones(n, int))
        refused("--data_dir", "imagenet64")
    Path("train_data_batch_2.npz").write_bytes(Path("train_data_batch_1.npz").read_bytes()[:999])
    refused("--data_dir", "imagenet64")
    for shape in ((2, 3, 32, 32), (2, 1, 64, 64)):
        write_zip("odd.zip", random_images(*shape), [0, 1])
        refused("64", "imagenet64", "odd.zip")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["folder", "zip", "first.npz", "last.npz"])
def test_own_images(kind, channels):
    """Grey or RGB, in class folders, a zip of EDM's, or an .npz with channels first or last. A
    folder around the classes' is no class, and links are followed."""
    images, labels = random_images(6, channels, 12, 12), [0, 0, 1, 1, 2, 2]
    if kind == "folder":
        write_folder(kind, images, [f"all/{'abc'[k]}/{i}.png" for i, k in enumerate(labels)])
        Path("folder/all/b").rename("elsewhere")
        Path("folder/all/b").symlink_to(Path("elsewhere").resolve())
    elif kind == "zip":
        write_zip(kind, images, labels, junk=True)
    else:
        last = images[:, 0] if channels == 1 else images.transpose(0, 2, 3, 1)
        np.savez(kind, images=last if kind == "last.npz" else images, labels=labels)
    data = load("images", kind, cond=True)
    assert np.array_equal(data.images, images) and data.labels.tolist() == labels
    assert data.class_weights == pytest.approx([1 / 3] * 3) and data.shape == (channels, 12, 12)
    assert load("images", kind).sample(3)[1] is None


def test_edms_zip_without_labels():
    """Fine without --cond. JPEG as well; hidden files and __MACOSX are not pictures."""
    for labels in (None, ()):
        write_zip("own.zip", random_images(6, 1, 8, 8), labels, junk=True)
        assert load("images", "own.zip").images.shape == (6, 1, 8, 8)
    write_zip("own.zip", random_images(6, 1, 8, 8), None)
    refused("--cond", "images", "own.zip", cond=True)
    write_folder("own", random_images(2, 3, 8, 8), ["a.png", "__MACOSX/._a.png"])
    Path("own/b.jpg").write_bytes(picture(np.full((3, 8, 8), 128, np.uint8), "JPEG"))
    Path("own/.DS_Store").write_bytes(b"junk")
    images = load("images", "own").images
    assert images.shape == (2, 3, 8, 8) and abs(images[1].float() - 128).max() < 3


GREY = random_images(8, 8)


@pytest.mark.parametrize("image", [random_images(8, 8, 4), GREY.astype(np.uint16) * 256, GREY > 99,
                                   random_images(8, 12), random_images(10, 10)])
def test_wrong_pictures(image):
    """With alpha, of 16 bits, of one; not square, no multiple of 4."""
    Path("own").mkdir()
    Image.fromarray(image).save("own/a.png")
    refused("--data_dir", "images", "own")


def test_wrong_folders():
    """Two sizes, classes for some, an empty class, a text, a cut picture, nothing, no folder."""
    names = {"sizes": ["a.png", "b.png"], "some": ["a.png", "cat/b.png"], "text": ["a.png"],
             "empty class": ["cat/a.png"], "cut": ["a.png", "b.png"], "flat": ["a.png"]}
    for folder, files in names.items():
        write_folder(folder, random_images(2, 1, 8, 8), files)
    write_folder("sizes", random_images(1, 1, 12, 12), ["b.png"])
    Path("text/notes.txt").write_text("hello")
    Path("cut/b.png").write_bytes(Path("cut/a.png").read_bytes()[:60])
    for folder in ("empty class/cow", "nothing"):
        Path(folder).mkdir()
    Path("page.zip").write_text("<html>")
    zipfile.ZipFile("empty.zip", "w").close()
    for where, words in {"sizes": "b.png", "empty class": "cow", "cut": "b.png",
                         "text": "notes.txt", "nothing": "no images", "page.zip": "PNG",
                         "empty.zip": "no images", "nowhere": "nowhere"}.items():
        refused(words, "images", where)
    refused("--cond", "images", "flat", cond=True)
    refused("a.png", "images", "some", cond=True)
    assert len(load("images", "some").images) == 2      # without --cond classes are not asked for


@pytest.mark.parametrize("arrays", [
    dict(x=1), dict(images=random_images(4, 8, 8) / 255), dict(images=random_images(4, 64)),
    dict(images=random_images(0, 3, 8, 8)), dict(images=np.array([None] * 4)),
    dict(images=random_images(4, 2, 8, 8)), dict(images=random_images(4, 8, 6, 3)),
    dict(images=random_images(4, 8, 8), labels=[0, 1]),
    dict(images=random_images(4, 8, 8), labels=[0, 1, 2, -1]),
    dict(images=random_images(4, 8, 8), labels=[0.5, 1, 2, 3])])
def test_wrong_npz(arrays):
    """No images, floats, no side, none at all, objects, 2 channels, not square; odd labels."""
    np.savez("own.npz", **arrays)
    refused("images", "images", "own.npz")
    Path("own.npz").write_text("no archive")
    refused("no .npz", "images", "own.npz")
