"""Dense prediction: detectors and segmentors on any backbone of timm or the zoo, with their data and measures.

What passes between the files, written once:

- Levels. A pyramid is a list of maps (B, C, H, W), finest first, and what tells of it is timm's `FeatureInfo`
  (`channels()`, `reduction()`): a backbone has one as `feature_info`, a neck takes one and has one, a head takes one.
- Samples. A dataset gives `(image, target)`: a uint8 tensor (C, H, W), and a dict with the `name` of the image (for
  people) and, of detection, `image_id` (int), `boxes` (tv_tensors.BoundingBoxes, float32 (N, 4), x0 y0 x1 y1 in
  pixels), `labels` (int64 (N,), 0 to K - 1), `masks` (tv_tensors.Mask, uint8 (N, H, W)), and in evaluation `crowd`
  (bool (N,)); of segmentation, `mask` (tv_tensors.Mask, (H, W), class indices, 255 where none counts). Training images
  come transformed, others as stored.
- Batches. `collate` makes lists of both, as images of a batch differ in size.
- Predictions. A dict an image, in pixels of the image that was given: of detection `boxes` float32 (N, 4), `scores`
  float32 (N,) in falling order, `labels` int64 (N,), and `masks` bool (N, H, W); of segmentation `mask` int64 (H, W).
"""
