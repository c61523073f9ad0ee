"""Huawei Ascend NPUs for hwcore, through torch_npu. Importing this package imports no torch."""
