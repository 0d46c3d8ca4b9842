# Shell functions for commands the host runs: `. /lib/functions.sh; network_up`

# The guest's network card with the addresses of QEMU's user network: the host is 10.0.2.2.
network_up() {
    modprobe virtio_pci && modprobe virtio_net || return
    ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up && route add default gw 10.0.2.2
}

# What is on the USB, a line each.
usb_tree() {
    for device in /sys/bus/usb/devices/*; do
        [ -e "$device/idVendor" ] || continue
        echo "${device##*/} $(cat "$device/idVendor"):$(cat "$device/idProduct")" \
            "speed=$(cat "$device/speed") $(cat "$device/product" 2>/dev/null)"
    done
}
