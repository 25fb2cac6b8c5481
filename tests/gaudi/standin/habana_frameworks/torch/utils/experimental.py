"""Which kind of Gaudi it is."""


class synDeviceType:  # the vendor's spelling
    synDeviceGaudi, synDeviceGaudi2, synDeviceGaudi3 = range(3)


def _get_device_type():
    return synDeviceType.synDeviceGaudi2
