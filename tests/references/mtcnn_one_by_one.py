"""MTCNN one photograph and one box at a time in NumPy and OpenCV, written from the description of the original's steps. `networks` are functions of arrays."""

import cv2
import numpy as np


def suppress(boxes, threshold, of_smaller):
    """Places of the boxes [n, 5] that stay, best first."""
    x1, y1, x2, y2, score = boxes.T[:5]
    area = (x2 - x1 + 1) * (y2 - y1 + 1)
    order, stay = np.argsort(score, kind="stable"), []
    while len(order):
        best, order = order[-1], order[:-1]
        stay.append(best)
        w = np.maximum(0, np.minimum(x2[best], x2[order]) - np.maximum(x1[best], x1[order]) + 1)
        h = np.maximum(0, np.minimum(y2[best], y2[order]) - np.maximum(y1[best], y1[order]) + 1)
        whole = np.minimum(area[best], area[order]) if of_smaller else area[best] + area[order] - w * h
        order = order[w * h / whole <= threshold]
    return np.asarray(stay, int)


def squared(boxes):
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    side = np.maximum(w, h)
    x, y = boxes[:, 0] + w * 0.5 - side * 0.5, boxes[:, 1] + h * 0.5 - side * 0.5
    return np.stack([x, y, x + side, y + side], 1)


def moved(boxes, shift, plus):
    w, h = boxes[:, 2] - boxes[:, 0] + plus, boxes[:, 3] - boxes[:, 1] + plus
    return boxes[:, :4] + shift * np.stack([w, h, w, h], 1)


def cut(image, box, side):
    x1, y1, x2, y2 = box.astype(int)
    patch = np.zeros((y2 - y1 + 1, x2 - x1 + 1, 3))
    height, width = image.shape[:2]
    top, left, bottom, right = max(y1, 1), max(x1, 1), min(y2, height), min(x2, width)
    patch[top - y1 : bottom - y1 + 1, left - x1 : right - x1 + 1] = image[top - 1 : bottom, left - 1 : right]
    return cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA)


def detect(image, networks, minimum=20, thresholds=(0.6, 0.7, 0.7), factor=0.709, stages=None):
    """boxes [n, 5], points [n, 5, 2]."""
    pnet, rnet, onet = networks
    height, width = image.shape[:2]
    side, scales = min(height, width) * 12.0 / minimum, []
    while side >= 12:
        scales.append(12.0 / minimum * factor ** len(scales))
        side *= factor
    found = np.zeros((0, 9))
    for scale in scales:
        small = cv2.resize(image, (int(np.ceil(width * scale)), int(np.ceil(height * scale))), interpolation=cv2.INTER_AREA)
        score, shift = pnet((small - 127.5) * 0.0078125)
        x, y = np.where(thresholds[0] <= score.T)
        if len(x) == 1:
            # The original mirrors the shifts of a level with a single candidate (generateBoundingBox).
            shift = shift[:, ::-1]
        corner = np.stack([x, y], 1)
        rows = np.concatenate([np.fix((2 * corner + 1) / scale), np.fix((2 * corner + 12) / scale), score[y, x][:, None], shift[y, x]], 1)
        found = np.concatenate([found, rows[suppress(rows, 0.5, False)]])
    found = found[suppress(found, 0.7, False)]
    boxes = np.fix(squared(moved(found, found[:, 5:], 0)))
    if stages is not None:
        stages["proposals"] = boxes, found[:, 4]
    if not len(boxes):
        return np.zeros((0, 5)), np.zeros((0, 5, 2))
    score, shift = rnet((np.stack([cut(image, box, 24) for box in boxes]) - 127.5) * 0.0078125)
    keep = score > thresholds[1]
    found, shift = np.concatenate([boxes[keep], score[keep, None]], 1), shift[keep]
    stay = suppress(found, 0.7, False)
    boxes = np.fix(squared(moved(found[stay], shift[stay], 1)))
    if stages is not None:
        stages["refined"] = boxes, found[stay, 4]
    if not len(boxes):
        return np.zeros((0, 5)), np.zeros((0, 5, 2))
    score, shift, points = onet((np.stack([cut(image, box, 48) for box in boxes]) - 127.5) * 0.0078125)
    keep = score > thresholds[2]
    boxes, score, shift, points = boxes[keep], score[keep], shift[keep], points[keep]
    extent = boxes[:, 2:] - boxes[:, :2] + 1
    points = np.stack([points[:, :5], points[:, 5:]], -1) * extent[:, None] + boxes[:, None, :2] - 1
    boxes = np.concatenate([moved(boxes, shift, 1), score[:, None]], 1)
    stay = suppress(boxes, 0.7, True)
    return boxes[stay], points[stay]
