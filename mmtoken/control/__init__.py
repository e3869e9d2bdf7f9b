"""Closed-loop control: policies that act on pictures, and episodes that remember what their actions looked at."""
