def write_plots(*a):
    pass


def write_report(*a):
    pass
