"""Worked answers to the exercises of 2_dmd.ipynb. Each goes into the first lines of its exercise's
cell; none of them runs alone."""


# Exercise 1: w = sigma^2 / mean|x - D_real|, and the scores differ by (D_fake - D_real) / sigma^2.
def my_gradient(x, d_real, d_fake):
    size = (x - d_real).abs().mean(1, keepdim=True)                                 # (B, 1)
    return (d_fake - d_real) / size


# Exercise 2: at sigma 1, N(m, 1) has D = m + (x_t - m) / 2 = (m + x_t) / 2. The difference is 1/2
# at every x_t. The student descends it: to the left, away from the data. A fake score that lags
# makes the student swing; more updates of it, or a lower rate for the student, help.
difference = 0.5
direction = "left"


# Exercise 3: what the first call gives is only a draft, its mistakes go under the fresh noise.
def two_calls(G, z_1, z_2, sigma_2):
    x = G(5 * z_1, level(z_1, 5))
    return G(x + sigma_2 * z_2, level(z_2, sigma_2))
