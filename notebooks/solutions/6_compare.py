"""Worked answers to the exercises of 6_compare.ipynb. Each goes into the first lines of its
exercise's cell; none of them runs alone."""


# Exercise 1: sim's loop knows the data through the teacher alone. Given a teacher, rectflow fits
# the teacher's pairs; its first stage, the flow, reads data, but a teacher stands in for that.
# The others need data: f-distill and dmd2 for the discriminator, consistency for the points x that
# noise is added to.
without_data = {"sim", "rectflow"}


# Exercise 2: each sample saves 34 calls.
def break_even(train, call):
    return train / (34 * call)
