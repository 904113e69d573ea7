"""Robot-learning datasets.

- `lerobot`: read and write LeRobotDataset v3.0 folders, without the lerobot package.
"""
