//! USB descriptors (USB 2.0 §9.6, USB CCID 1.1 §5.1) and the same facts as plain data.

use crate::config::{DeviceConfig, Layout, Speed};

/// bConfigurationValue of the one configuration.
pub(crate) const CONFIGURATION: u8 = 1;
/// wMaxPacketSize of an interrupt endpoint: the longest notification has five bytes.
const INTERRUPT_PACKET: u16 = 8;
/// Clock in kHz: default, maximum and the only one (USB CCID 1.1 §5.1, dwDefaultClock).
pub(crate) const CLOCK_KHZ: u32 = 4000;
/// Data rates in bit/s at 4 MHz with F = 372 and D = 1 to 64, for hosts that ask. They mean nothing to a
/// virtual card.
pub(crate) const DATA_RATES: [u32; 7] = [10_752, 21_505, 43_010, 86_021, 172_043, 344_086, 688_172];
/// Automatic parameters, voltage, clock, baud rate and PPS; short and extended APDU level (USB CCID 1.1
/// §5.1).
const FEATURES: u32 = 0x0004_00BA;

const DEVICE: u8 = 1;
const CONFIGURATION_TYPE: u8 = 2;
const STRING: u8 = 3;
const INTERFACE: u8 = 4;
const ENDPOINT: u8 = 5;
const DEVICE_QUALIFIER: u8 = 6;
const OTHER_SPEED: u8 = 7;
/// The CCID functional descriptor (USB CCID 1.1 §5.1).
const CCID: u8 = 0x21;

/// iManufacturer, iProduct (also iInterface) and iSerialNumber, where there are such strings.
const MANUFACTURER: u8 = 1;
const PRODUCT: u8 = 2;
const SERIAL: u8 = 3;
/// English (United States), the only language.
const LANGUAGE: u16 = 0x0409;

/// A device as a carrier describes it to its peer: what the descriptors say, as plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// idVendor.
    pub vendor_id: u16,
    /// idProduct.
    pub product_id: u16,
    /// bcdDevice.
    pub device_version: u16,
    /// bDeviceClass, bDeviceSubClass, bDeviceProtocol: zeros, the class is the interface's.
    pub class: [u8; 3],
    /// The speed it runs at.
    pub speed: Speed,
    /// wMaxPacketSize of endpoint 0.
    pub control_packet: u8,
    /// bConfigurationValue of the one configuration.
    pub configuration: u8,
    /// Its interfaces, by number from 0.
    pub interfaces: Vec<Interface>,
}

/// One interface of a [`Topology`]. It has no alternate setting but 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// bInterfaceNumber.
    pub number: u8,
    /// bInterfaceClass, bInterfaceSubClass, bInterfaceProtocol: 0B, 00, 00 (USB CCID 1.1 §4.2).
    pub class: [u8; 3],
    /// Bulk-OUT, bulk-IN and interrupt-IN.
    pub endpoints: [Endpoint; 3],
}

/// One endpoint of an [`Interface`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// bEndpointAddress; bit 7 set means IN.
    pub address: u8,
    /// Its transfer type.
    pub kind: EndpointKind,
    /// bInterval.
    pub interval: u8,
    /// wMaxPacketSize.
    pub max_packet: u16,
}

/// The transfer type of an [`Endpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndpointKind {
    /// Bulk.
    Bulk,
    /// Interrupt.
    Interrupt,
}

/// Which of an interface's three endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pipe {
    BulkOut,
    BulkIn,
    Interrupt,
}

impl Pipe {
    pub(crate) const ALL: [Self; 3] = [Self::BulkOut, Self::BulkIn, Self::Interrupt];

    /// Interface `n` has endpoints 2n+1 (bulk, both directions) and 2n+2 (interrupt).
    fn address(self, interface: u8) -> u8 {
        match self {
            Self::BulkOut => 2 * interface + 1,
            Self::BulkIn => 0x80 | (2 * interface + 1),
            Self::Interrupt => 0x80 | (2 * interface + 2),
        }
    }

    /// The interface's number and the pipe; any address has one, whether there is such an interface or not.
    pub(crate) fn of_address(address: u8) -> Option<(usize, Self)> {
        let number = (address & 0x0F).checked_sub(1)?;
        let pipe = match (address & 0xF0, number % 2) {
            (0x00, 0) => Self::BulkOut,
            (0x80, 0) => Self::BulkIn,
            (0x80, 1) => Self::Interrupt,
            _ => return None,
        };
        Some((usize::from(number / 2), pipe))
    }
}

/// wMaxPacketSize of the bulk endpoints (USB 2.0 §5.8.3).
pub(crate) fn bulk_packet(speed: Speed) -> u16 {
    match speed {
        Speed::Full => 64,
        Speed::High => 512,
    }
}

/// Interfaces, and slots of each.
pub(crate) fn shape(layout: Layout) -> (u8, u8) {
    match layout {
        Layout::Slots(slots) => (1, slots),
        Layout::Interfaces(interfaces) => (interfaces, 1),
    }
}

pub(crate) fn topology(config: &DeviceConfig) -> Topology {
    Topology {
        vendor_id: config.vendor_id,
        product_id: config.product_id,
        device_version: 0x0100,
        class: [0, 0, 0],
        speed: config.speed,
        control_packet: 64,
        configuration: CONFIGURATION,
        interfaces: (0..shape(config.layout).0).map(|number| interface(number, config.speed)).collect(),
    }
}

fn interface(number: u8, speed: Speed) -> Interface {
    let endpoints = Pipe::ALL.map(|pipe| {
        let (kind, interval, max_packet) = match (pipe, speed) {
            (Pipe::BulkOut | Pipe::BulkIn, speed) => (EndpointKind::Bulk, 0, bulk_packet(speed)),
            // 16 ms both: frames at full speed, 2^(8-1) microframes at high speed (USB 2.0 §9.6.6).
            (Pipe::Interrupt, Speed::Full) => (EndpointKind::Interrupt, 16, INTERRUPT_PACKET),
            (Pipe::Interrupt, Speed::High) => (EndpointKind::Interrupt, 8, INTERRUPT_PACKET),
        };
        Endpoint { address: pipe.address(number), kind, interval, max_packet }
    });
    Interface { number, class: [0x0B, 0, 0], endpoints }
}

/// The descriptor that GET_DESCRIPTOR asks for (USB 2.0 §9.4.3), if there is one.
pub(crate) fn descriptor(config: &DeviceConfig, kind: u8, index: u8) -> Option<Vec<u8>> {
    match (kind, index, config.speed) {
        (DEVICE, 0, _) => Some(device(config)),
        (CONFIGURATION_TYPE, 0, speed) => Some(configuration(config, CONFIGURATION_TYPE, speed)),
        (STRING, _, _) => string(config, index),
        // Only a device that knows both speeds has these two (USB 2.0 §9.6.2).
        (DEVICE_QUALIFIER, 0, Speed::High) => Some(vec![10, DEVICE_QUALIFIER, 0x00, 0x02, 0, 0, 0, 64, 1, 0]),
        (OTHER_SPEED, 0, Speed::High) => Some(configuration(config, OTHER_SPEED, Speed::Full)),
        _ => None,
    }
}

fn device(config: &DeviceConfig) -> Vec<u8> {
    let topology = topology(config);
    // At full speed a device of version 2.00 is asked for its qualifier, three times over; 1.10 is not.
    let usb: u16 = match config.speed {
        Speed::Full => 0x0110,
        Speed::High => 0x0200,
    };
    let [class, subclass, protocol] = topology.class;
    let mut bytes = vec![18, DEVICE];
    bytes.extend(usb.to_le_bytes());
    bytes.extend([class, subclass, protocol, topology.control_packet]);
    bytes.extend(topology.vendor_id.to_le_bytes());
    bytes.extend(topology.product_id.to_le_bytes());
    bytes.extend(topology.device_version.to_le_bytes());
    bytes.extend([
        string_index(&config.manufacturer, MANUFACTURER),
        string_index(&config.product, PRODUCT),
        string_index(&config.serial, SERIAL),
        1,
    ]);
    bytes
}

fn configuration(config: &DeviceConfig, kind: u8, speed: Speed) -> Vec<u8> {
    let (interfaces, slots) = shape(config.layout);
    // Bus powered, 100 mA, no remote wakeup.
    let mut bytes = vec![9, kind, 0, 0, interfaces, CONFIGURATION, 0, 0x80, 50];
    for number in 0..interfaces {
        let interface = interface(number, speed);
        let [class, subclass, protocol] = interface.class;
        let name = string_index(&config.product, PRODUCT);
        bytes.extend([9, INTERFACE, number, 0, 3, class, subclass, protocol, name]);
        // Directly after the interface, or libccid does not find it.
        functional(config, slots, &mut bytes);
        for endpoint in interface.endpoints {
            let attributes = match endpoint.kind {
                EndpointKind::Bulk => 2,
                EndpointKind::Interrupt => 3,
            };
            let [low, high] = endpoint.max_packet.to_le_bytes();
            bytes.extend([7, ENDPOINT, endpoint.address, attributes, low, high, endpoint.interval]);
        }
    }
    // At most 9 + 7 * (9 + 54 + 21) bytes.
    let total = bytes.len() as u16;
    bytes[2..4].copy_from_slice(&total.to_le_bytes());
    bytes
}

/// The CCID functional descriptor (USB CCID 1.1 §5.1).
fn functional(config: &DeviceConfig, slots: u8, bytes: &mut Vec<u8>) {
    let [default_rate, .., max_rate] = DATA_RATES;
    bytes.extend([0x36, CCID]);
    bytes.extend(0x0110_u16.to_le_bytes()); // bcdCCID
    bytes.extend([slots - 1, 7]); // bMaxSlotIndex, bVoltageSupport
    bytes.extend(3_u32.to_le_bytes()); // dwProtocols: T=0 and T=1
    bytes.extend(CLOCK_KHZ.to_le_bytes()); // dwDefaultClock
    bytes.extend(CLOCK_KHZ.to_le_bytes()); // dwMaximumClock
    bytes.push(1); // bNumClockSupported
    bytes.extend(default_rate.to_le_bytes()); // dwDataRate
    bytes.extend(max_rate.to_le_bytes()); // dwMaxDataRate
    // bNumDataRatesSupported 0: all between the two. With a list libccid refuses cards in specific mode (TA2)
    // whose rate is not in it.
    bytes.push(0);
    bytes.extend(254_u32.to_le_bytes()); // dwMaxIFSD
    bytes.extend(0_u32.to_le_bytes()); // dwSynchProtocols
    bytes.extend(0_u32.to_le_bytes()); // dwMechanical
    bytes.extend(FEATURES.to_le_bytes()); // dwFeatures
    bytes.extend(config.max_message.to_le_bytes()); // dwMaxCCIDMessageLength
    // bClassGetResponse and bClassEnvelope (as in the APDU), wLcdLayout, bPINSupport, bMaxCCIDBusySlots
    // (all).
    bytes.extend([0xFF, 0xFF, 0, 0, 0, slots]);
}

fn string_index(string: &str, index: u8) -> u8 {
    if string.is_empty() { 0 } else { index }
}

fn string(config: &DeviceConfig, index: u8) -> Option<Vec<u8>> {
    let units: Vec<u16> = match index {
        0 => vec![LANGUAGE],
        MANUFACTURER => config.manufacturer.encode_utf16().collect(),
        PRODUCT => config.product.encode_utf16().collect(),
        SERIAL => config.serial.encode_utf16().collect(),
        _ => return None,
    };
    if units.is_empty() {
        return None;
    }
    // At most 126 units: checked with the configuration.
    let mut bytes = vec![(2 + 2 * units.len()) as u8, STRING];
    bytes.extend(units.into_iter().flat_map(u16::to_le_bytes));
    Some(bytes)
}
