"""What a device is asked where one is at hand, step by step, and the page that it leaves."""
