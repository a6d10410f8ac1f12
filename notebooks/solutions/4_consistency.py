"""Worked answers to the exercises of 4_consistency.ipynb. Each goes into the first lines of its
exercise's cell; none of them runs alone."""


# Exercise 1: at sigma 0 the root is s, so x - m shrinks by s / sqrt(s^2 + sigma^2).
def end_of_path(x, sigma):
    return m + (x - m) * s / (s**2 + sigma**2) ** 0.5


# Exercise 2: x_t + (s - t) (x_t - D) / t = s/t x_t + (1 - s/t) D. For s = t it is x_t, for s = 0 it
# is D, whatever the network says: both ends are built in, as f(x, 0) = x is in the student of CD.
def weights(t, s):
    return s / t, 1 - s / t


# Exercise 3: the mean of (x_t - x) / sigma over the origins is (x_t - E[x | x_t]) / sigma, and
# E[x | x_t] is the denoiser. A loss that is linear in the slope, as a derivative is, needs no more.
def mean_slope(x_t, sigma, x):
    weight = (-(x_t - x).square().sum(1) / (2 * sigma**2)).softmax(0)               # (n,)
    return weight @ ((x_t - x) / sigma)
