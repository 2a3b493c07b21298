"""Makes expected.npz with TensorFlow 2.21, which the tests do not need: `pip install tensorflow-cpu`, then run it."""

import math
from pathlib import Path

import numpy as np
import tensorflow as tf

SIDE = math.sqrt(0.9)


def crop(image, top, left, size):
    box = [[top, left, top + SIDE, left + SIDE]]
    return tf.clip_by_value(tf.image.crop_and_resize(image[None], box, [0], (size, size))[0], 0, 1)


def augmented(image, top, left, brightness, contrast, saturation, hue):
    found = crop(tf.image.convert_image_dtype(image, tf.float32), top * (1 - SIDE), left * (1 - SIDE), len(image))
    found = tf.clip_by_value(tf.image.adjust_brightness(found, (brightness - 0.5) * 0.4), 0, 1)
    found = tf.clip_by_value(tf.image.adjust_contrast(found, 0.8 + 0.4 * contrast), 0, 1)
    found = tf.clip_by_value(tf.image.adjust_saturation(found, 0.8 + 0.4 * saturation), 0, 1)
    found = tf.clip_by_value(tf.image.adjust_hue(found, (hue - 0.5) * 0.1), 0, 1)
    return tf.image.convert_image_dtype(found, tf.uint8, saturate=True).numpy()


def evaluated(image, size):
    packed = tf.io.decode_image(tf.image.encode_jpeg(image), expand_animations=False, dtype=tf.uint8)
    small = tf.image.resize(packed, (size, size), method="lanczos3", antialias=True)
    small = tf.cast(tf.clip_by_value(tf.round(small), 0, 255), tf.uint8)
    return tf.image.convert_image_dtype(centre(small), tf.uint8, saturate=True).numpy()


def centre(image):
    return crop(tf.image.convert_image_dtype(image, tf.float32), (1 - SIDE) / 2, (1 - SIDE) / 2, len(image))


rng = np.random.default_rng(0)
y, x = np.mgrid[:48, :48]
image = np.stack([(x * 5) % 256, (y * 7 + x) % 256, rng.integers(0, 256, (48, 48))], -1).astype(np.uint8)
image[:8, :8], image[8:12, :8], image[12:16, :8] = 128, 0, 255  # grey, black and white have no hue
draws = rng.random((6, 6))
draws[:3] = [[0.0], [0.999], [0.5]]
y, x = np.mgrid[:256, :256]
frame = np.stack([127 + 120 * np.sin(x / 17), 127 + 120 * np.cos(y / 23), (x + y) / 2], -1).astype(np.uint8)
frame[60:120, 60:150] = [200, 30, 40]
np.savez_compressed(
    Path(__file__).with_name("expected.npz"),
    image=image,
    draws=draws,
    augmented=np.stack([augmented(image, *draw) for draw in draws]),
    cropped=tf.image.convert_image_dtype(centre(image), tf.uint8, saturate=True).numpy(),
    evaluated=evaluated(frame, 224)[::4, ::4],
)
