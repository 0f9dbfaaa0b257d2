"""The recipe that makes the default bundle: data, VAE, teacher, LCM student, judge, export."""
