//! usbredir packets to bytes and back, as far as a device's owner sends and receives them.
//!
//! All integers are little-endian. A packet is a header (type, length, id), a header of its type, and data, which
//! only goes towards its receiver. The id has 64 bits if both sides said so in their hello, which itself always
//! has one of 32.

use std::fmt;

use thiserror::Error;
use vscard_protocol::Secret;
use zeroize::Zeroizing;

/// Most data taken with one packet, in bytes: the longest CCID message has 65 554. What is longer is passed over.
pub(super) const MAX_DATA: usize = 70 * 1024;
/// Longest packet that is passed over. QEMU sends nothing above 128 MiB and 1 KiB of headers; a larger length is
/// the mark of a stream that was not followed.
const MAX_PACKET: u32 = (128 << 20) + 1024;
/// Version field of a hello.
const VERSION: usize = 64;
/// Places for endpoints in an ep_info, for interfaces in an interface_info.
pub(super) const PLACES: usize = 32;
/// An endpoint that does not exist, in an ep_info.
const EP_INVALID: u8 = 255;
/// What a hello says of us.
const OUR_VERSION: &str = concat!("ccid-device ", env!("CARGO_PKG_VERSION"));

/// Type of a usbredir packet. Unknown values are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PacketType(pub u32);

macro_rules! packet_types {
    ($($name:ident = $number:literal $text:literal)*) => {
        impl PacketType {
            $(#[doc = concat!("`", $text, "`")] pub const $name: Self = Self($number);)*

            fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

packet_types! {
    HELLO = 0 "hello"
    DEVICE_CONNECT = 1 "device_connect"
    DEVICE_DISCONNECT = 2 "device_disconnect"
    RESET = 3 "reset"
    INTERFACE_INFO = 4 "interface_info"
    EP_INFO = 5 "ep_info"
    SET_CONFIGURATION = 6 "set_configuration"
    GET_CONFIGURATION = 7 "get_configuration"
    CONFIGURATION_STATUS = 8 "configuration_status"
    SET_ALT_SETTING = 9 "set_alt_setting"
    GET_ALT_SETTING = 10 "get_alt_setting"
    ALT_SETTING_STATUS = 11 "alt_setting_status"
    START_INTERRUPT_RECEIVING = 15 "start_interrupt_receiving"
    STOP_INTERRUPT_RECEIVING = 16 "stop_interrupt_receiving"
    INTERRUPT_RECEIVING_STATUS = 17 "interrupt_receiving_status"
    CANCEL_DATA_PACKET = 21 "cancel_data_packet"
    FILTER_REJECT = 22 "filter_reject"
    FILTER_FILTER = 23 "filter_filter"
    DEVICE_DISCONNECT_ACK = 24 "device_disconnect_ack"
    CONTROL_PACKET = 100 "control_packet"
    BULK_PACKET = 101 "bulk_packet"
    INTERRUPT_PACKET = 103 "interrupt_packet"
}

impl fmt::Display for PacketType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "type {}", self.0),
        }
    }
}

impl fmt::Debug for PacketType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PacketType({self})")
    }
}

/// How a request ended. Unknown values are kept; whatever is not success is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status(pub(super) u8);

impl Status {
    pub(super) const SUCCESS: Self = Self(0);
    pub(super) const CANCELLED: Self = Self(1);
    /// The request makes no sense.
    pub(super) const INVALID: Self = Self(2);
    pub(super) const IO_ERROR: Self = Self(3);
    pub(super) const STALL: Self = Self(4);
}

/// What a side can do; what both can is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Caps(pub(super) u32);

impl Caps {
    /// device_connect has bcdDevice.
    pub(super) const CONNECT_VERSION: Self = Self(1 << 1);
    pub(super) const FILTER: Self = Self(1 << 2);
    /// device_disconnect is acknowledged.
    pub(super) const DISCONNECT_ACK: Self = Self(1 << 3);
    /// ep_info has wMaxPacketSize.
    pub(super) const MAX_PACKET_SIZE: Self = Self(1 << 4);
    pub(super) const WIDE_IDS: Self = Self(1 << 5);
    /// bulk_packet has the upper half of its length.
    pub(super) const LONG_BULK: Self = Self(1 << 6);
    /// All of them and nothing else: no streams, no bulk receiving.
    pub(super) const OURS: Self = Self(
        Self::CONNECT_VERSION.0
            | Self::FILTER.0
            | Self::DISCONNECT_ACK.0
            | Self::MAX_PACKET_SIZE.0
            | Self::WIDE_IDS.0
            | Self::LONG_BULK.0,
    );

    /// Without these QEMU does not let a device onto an xHCI controller.
    pub(super) const FOR_XHCI: Self = Self(Self::MAX_PACKET_SIZE.0 | Self::WIDE_IDS.0 | Self::LONG_BULK.0);

    pub(super) fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    fn header(self) -> usize {
        if self.has(Self::WIDE_IDS) { 16 } else { 12 }
    }

    fn bulk_header(self) -> usize {
        if self.has(Self::LONG_BULK) { 10 } else { 8 }
    }
}

/// Why bytes are not a usbredir packet. Offsets count from the first byte of the packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The length field is above what any peer sends. The stream cannot be followed any further.
    #[error("length at offset 4 of a {kind} packet is {length}, above the limit of {MAX_PACKET}")]
    TooLong {
        /// Type of the packet.
        kind: PacketType,
        /// Its length field, in bytes.
        length: u32,
    },
    /// A length that the type cannot have. The packet is skipped; the next one can be read.
    #[error("length at offset 4 of a {kind} packet is {length}, expected {expected}")]
    Length {
        /// Type of the packet.
        kind: PacketType,
        /// Its length field, in bytes.
        length: u32,
        /// What its type demands.
        expected: &'static str,
    },
    /// A transfer's length field that contradicts the data. The packet is skipped; the next one can be read.
    #[error(
        "length at offset {offset} of a {kind} packet to endpoint {endpoint:#04x} is {length}, with {data} bytes of data"
    )]
    Data {
        /// Type of the packet.
        kind: PacketType,
        /// Where the field is.
        offset: usize,
        /// The endpoint's address.
        endpoint: u8,
        /// The field.
        length: u32,
        /// Length of the data, in bytes.
        data: usize,
    },
}

impl DecodeError {
    /// Whether the stream can no longer be followed.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::TooLong { .. } => true,
            // Without a hello nothing is known of the packets to come.
            Self::Length { kind, .. } => *kind == PacketType::HELLO,
            Self::Data { .. } => false,
        }
    }
}

/// A packet from the guest's side.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: u64,
    pub(super) body: RequestBody,
}

#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub(super) enum RequestBody {
    Hello {
        caps: Caps,
        /// Printable.
        version: String,
    },
    Reset,
    SetConfiguration(u8),
    GetConfiguration,
    SetAltSetting {
        interface: u8,
        alt: u8,
    },
    GetAltSetting {
        interface: u8,
    },
    StartInterruptReceiving {
        endpoint: u8,
    },
    StopInterruptReceiving {
        endpoint: u8,
    },
    Cancel,
    FilterReject,
    /// What the guest's side would take; it judges by itself.
    Filter,
    DisconnectAck,
    Control(Control, Secret),
    Bulk {
        endpoint: u8,
        stream: u32,
        transfer: Transfer,
    },
    /// To an interrupt OUT endpoint.
    Interrupt {
        endpoint: u8,
    },
    /// Anything else. Its content is not kept.
    Other(PacketType),
}

/// Header of a control_packet, but for the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Control {
    /// 0x80 for IN, 0 for OUT.
    pub(super) endpoint: u8,
    pub(super) request: u8,
    pub(super) request_type: u8,
    pub(super) value: u16,
    pub(super) index: u16,
    pub(super) length: u16,
}

#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub(super) enum Transfer {
    /// At most so many bytes are wanted.
    In(u32),
    Out(Secret),
    /// More than [`MAX_DATA`]; not kept.
    OutTooLong,
}

/// A packet to the guest's side.
pub(super) enum Reply<'a> {
    Hello,
    DeviceConnect(DeviceConnect),
    DeviceDisconnect,
    InterfaceInfo(&'a InterfaceInfo),
    EpInfo(&'a EpInfo),
    ConfigurationStatus { status: Status, configuration: u8 },
    AltSettingStatus { status: Status, interface: u8, alt: u8 },
    InterruptReceivingStatus { status: Status, endpoint: u8 },
    Control { header: Control, status: Status, data: &'a [u8] },
    BulkIn { endpoint: u8, stream: u32, status: Status, data: &'a [u8] },
    BulkOut { endpoint: u8, stream: u32, status: Status, length: u32 },
    InterruptIn { endpoint: u8, status: Status, data: &'a [u8] },
    InterruptOut { endpoint: u8, status: Status },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceConnect {
    pub(super) speed: u8,
    pub(super) class: [u8; 3],
    pub(super) vendor: u16,
    pub(super) product: u16,
    pub(super) version: u16,
}

/// The interfaces: number, class, subclass and protocol of each. At most [`PLACES`] are told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct InterfaceInfo(pub(super) Vec<[u8; 4]>);

/// One endpoint of an [`EpInfo`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EpPlace {
    pub(super) kind: u8,
    pub(super) interval: u8,
    pub(super) interface: u8,
    pub(super) max_packet_size: u16,
}

impl EpPlace {
    const UNUSED: Self = Self { kind: EP_INVALID, interval: 0, interface: 0, max_packet_size: 0 };
}

/// The endpoints; 0 to 15 are OUT, 16 to 31 IN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EpInfo(pub(super) [EpPlace; PLACES]);

impl EpInfo {
    /// Only the two halves of the control endpoint.
    pub(super) fn new(control_packet_size: u16) -> Self {
        let control = EpPlace { kind: 0, max_packet_size: control_packet_size, ..EpPlace::UNUSED };
        let mut places = [EpPlace::UNUSED; PLACES];
        for (index, place) in places.iter_mut().enumerate() {
            if index % 16 == 0 {
                *place = control;
            }
        }
        Self(places)
    }

    pub(super) fn set(&mut self, address: u8, place: EpPlace) {
        let index = usize::from((address & 0x80) >> 3 | address & 0x0F);
        if let Some(slot) = self.0.get_mut(index) {
            *slot = place;
        }
    }
}

/// Writes a packet, to be sent in one piece. `caps` is what both sides can; a hello knows nothing of it.
pub(super) fn encode(id: u64, reply: &Reply<'_>, caps: Caps) -> Secret {
    let (kind, fixed, data): (_, _, &[u8]) = match reply {
        Reply::Hello => (PacketType::HELLO, VERSION + 4, &[]),
        Reply::DeviceConnect(_) => (PacketType::DEVICE_CONNECT, 8, &[]),
        Reply::DeviceDisconnect => (PacketType::DEVICE_DISCONNECT, 0, &[]),
        Reply::InterfaceInfo(_) => (PacketType::INTERFACE_INFO, 4 + 4 * PLACES, &[]),
        Reply::EpInfo(_) => (PacketType::EP_INFO, 3 * PLACES, &[]),
        Reply::ConfigurationStatus { .. } => (PacketType::CONFIGURATION_STATUS, 2, &[]),
        Reply::AltSettingStatus { .. } => (PacketType::ALT_SETTING_STATUS, 3, &[]),
        Reply::InterruptReceivingStatus { .. } => (PacketType::INTERRUPT_RECEIVING_STATUS, 2, &[]),
        Reply::Control { data, .. } => (PacketType::CONTROL_PACKET, 10, data),
        Reply::BulkIn { data, .. } => (PacketType::BULK_PACKET, caps.bulk_header(), data),
        Reply::BulkOut { .. } => (PacketType::BULK_PACKET, caps.bulk_header(), &[]),
        Reply::InterruptIn { data, .. } => (PacketType::INTERRUPT_PACKET, 4, data),
        Reply::InterruptOut { .. } => (PacketType::INTERRUPT_PACKET, 4, &[]),
    };
    let fixed = match reply {
        Reply::DeviceConnect(_) if caps.has(Caps::CONNECT_VERSION) => fixed + 2,
        Reply::EpInfo(_) if caps.has(Caps::MAX_PACKET_SIZE) => fixed + 2 * PLACES,
        _ => fixed,
    };
    let caps = if kind == PacketType::HELLO { Caps::default() } else { caps };
    // All at once: a buffer that grows would leave unwiped copies behind.
    let mut out = Vec::with_capacity(caps.header() + fixed + data.len());
    out.extend(kind.0.to_le_bytes());
    out.extend(((fixed + data.len()) as u32).to_le_bytes());
    if caps.has(Caps::WIDE_IDS) {
        out.extend(id.to_le_bytes())
    } else {
        out.extend((id as u32).to_le_bytes())
    }
    match *reply {
        Reply::Hello => {
            out.extend(OUR_VERSION.as_bytes());
            out.resize(out.len() + VERSION - OUR_VERSION.len(), 0);
            out.extend(Caps::OURS.0.to_le_bytes());
        }
        Reply::DeviceConnect(device) => {
            out.push(device.speed);
            out.extend(device.class);
            out.extend(device.vendor.to_le_bytes());
            out.extend(device.product.to_le_bytes());
            if caps.has(Caps::CONNECT_VERSION) {
                out.extend(device.version.to_le_bytes());
            }
        }
        Reply::DeviceDisconnect => {}
        Reply::InterfaceInfo(info) => {
            out.extend((info.0.len().min(PLACES) as u32).to_le_bytes());
            for field in 0..4 {
                for place in 0..PLACES {
                    out.push(info.0.get(place).map_or(0, |interface| interface[field]));
                }
            }
        }
        Reply::EpInfo(info) => {
            info.0.iter().for_each(|place| out.push(place.kind));
            info.0.iter().for_each(|place| out.push(place.interval));
            info.0.iter().for_each(|place| out.push(place.interface));
            if caps.has(Caps::MAX_PACKET_SIZE) {
                info.0.iter().for_each(|place| out.extend(place.max_packet_size.to_le_bytes()));
            }
        }
        Reply::ConfigurationStatus { status, configuration } => out.extend([status.0, configuration]),
        Reply::AltSettingStatus { status, interface, alt } => out.extend([status.0, interface, alt]),
        Reply::InterruptReceivingStatus { status, endpoint } => out.extend([status.0, endpoint]),
        Reply::Control { header, status, .. } => put_control(&mut out, header, status),
        Reply::BulkIn { endpoint, stream, status, data } => {
            put_bulk(&mut out, endpoint, stream, status, data.len() as u32, caps);
        }
        Reply::BulkOut { endpoint, stream, status, length } => {
            put_bulk(&mut out, endpoint, stream, status, length, caps);
        }
        Reply::InterruptIn { endpoint, status, data } => {
            out.extend([endpoint, status.0]);
            out.extend((data.len() as u16).to_le_bytes());
        }
        Reply::InterruptOut { endpoint, status } => out.extend([endpoint, status.0, 0, 0]),
    }
    out.extend(data);
    Secret::new(out)
}

fn put_control(out: &mut Vec<u8>, header: Control, status: Status) {
    // The request before its type, other than in a setup packet.
    out.extend([header.endpoint, header.request, header.request_type, status.0]);
    out.extend(header.value.to_le_bytes());
    out.extend(header.index.to_le_bytes());
    out.extend(header.length.to_le_bytes());
}

fn put_bulk(out: &mut Vec<u8>, endpoint: u8, stream: u32, status: Status, length: u32, caps: Caps) {
    out.extend([endpoint, status.0]);
    out.extend((length as u16).to_le_bytes());
    out.extend(stream.to_le_bytes());
    if caps.has(Caps::LONG_BULK) {
        out.extend(((length >> 16) as u16).to_le_bytes());
    }
}

/// Finds packets in a stream of bytes. Holds one packet at most, in memory that is wiped.
pub(super) struct Decoder {
    caps: Caps,
    /// The header, then what is kept of the rest.
    buffer: Zeroizing<Vec<u8>>,
    plan: Option<Plan>,
}

/// What is to be done with the rest of a packet.
#[derive(Clone, Copy)]
struct Plan {
    kind: PacketType,
    id: u64,
    length: u32,
    keep: usize,
    skip: usize,
    /// What its type demands of the length, where that is not met.
    expected: Option<&'static str>,
}

impl Plan {
    /// How much data there is after a type header of that length, kept or not.
    fn data(&self, header: usize) -> usize {
        (self.length as usize).saturating_sub(header)
    }
}

impl Decoder {
    /// A decoder for a stream that begins with a hello.
    pub(super) fn new() -> Self {
        Self { caps: Caps::default(), buffer: Zeroizing::default(), plan: None }
    }

    /// What both sides can, known from the hello: packets have that form from here on.
    pub(super) fn agree(&mut self, caps: Caps) {
        self.caps = caps;
    }

    /// Takes bytes from the front of `input` up to the end of the first packet.
    ///
    /// `None`: all of `input` is taken and more is needed.
    ///
    /// # Errors
    /// [`DecodeError`]; after one that [is fatal](DecodeError::is_fatal) the decoder must not be used again.
    pub(super) fn decode(&mut self, input: &mut &[u8]) -> Option<Result<Request, DecodeError>> {
        loop {
            let Some(plan) = &mut self.plan else {
                let header = self.caps.header();
                if self.buffer.capacity() < header {
                    self.buffer = Zeroizing::new(Vec::with_capacity(header));
                }
                if !fill(&mut self.buffer, header, input) {
                    return None;
                }
                let (kind, length, id) = header_of(&self.buffer)?;
                let plan = match plan(kind, length, id, self.caps) {
                    Ok(plan) => plan,
                    Err(error) => return Some(Err(error)),
                };
                self.buffer = Zeroizing::new(Vec::with_capacity(plan.keep));
                self.plan = Some(plan);
                continue;
            };
            if !fill(&mut self.buffer, plan.keep, input) {
                return None;
            }
            let passed = plan.skip.min(input.len());
            *input = input.get(passed..).unwrap_or_default();
            plan.skip -= passed;
            if plan.skip > 0 {
                return None;
            }
            let plan = self.plan.take()?;
            let rest = std::mem::take(&mut self.buffer);
            return Some(finish(plan, &rest, self.caps));
        }
    }

    /// Whether part of a packet is waiting for the rest.
    pub(super) fn in_packet(&self) -> bool {
        self.plan.is_some() || !self.buffer.is_empty()
    }
}

/// Fills `buffer` up to `wanted` bytes; whether there was enough.
fn fill(buffer: &mut Vec<u8>, wanted: usize, input: &mut &[u8]) -> bool {
    let missing = wanted.saturating_sub(buffer.len());
    let (now, later) = input.split_at(missing.min(input.len()));
    buffer.extend_from_slice(now);
    *input = later;
    buffer.len() >= wanted
}

fn header_of(header: &[u8]) -> Option<(PacketType, u32, u64)> {
    let (kind, rest) = header.split_first_chunk()?;
    let (length, id) = rest.split_first_chunk()?;
    let id = match (<[u8; 8]>::try_from(id), <[u8; 4]>::try_from(id)) {
        (Ok(wide), _) => u64::from_le_bytes(wide),
        (_, Ok(narrow)) => u32::from_le_bytes(narrow).into(),
        _ => return None,
    };
    Some((PacketType(u32::from_le_bytes(*kind)), u32::from_le_bytes(*length), id))
}

/// Judges a length before a byte more is kept.
fn plan(kind: PacketType, length: u32, id: u64, caps: Caps) -> Result<Plan, DecodeError> {
    if length > MAX_PACKET {
        return Err(DecodeError::TooLong { kind, length });
    }
    let all = length as usize;
    let exactly = |wanted, expected| if all == wanted { (wanted, None) } else { (0, Some(expected)) };
    let with_data = |header, expected| {
        if all < header {
            (0, Some(expected))
        } else if all - header <= MAX_DATA {
            (all, None)
        } else {
            (header, None)
        }
    };
    let (keep, expected) = match kind {
        PacketType::HELLO if all < VERSION || all % 4 != 0 => (0, Some("64 and 4 for each word")),
        PacketType::HELLO => (all.min(VERSION + 4), None),
        PacketType::RESET
        | PacketType::GET_CONFIGURATION
        | PacketType::CANCEL_DATA_PACKET
        | PacketType::FILTER_REJECT
        | PacketType::DEVICE_DISCONNECT_ACK => exactly(0, "0"),
        PacketType::SET_CONFIGURATION
        | PacketType::GET_ALT_SETTING
        | PacketType::START_INTERRUPT_RECEIVING
        | PacketType::STOP_INTERRUPT_RECEIVING => exactly(1, "1"),
        PacketType::SET_ALT_SETTING => exactly(2, "2"),
        PacketType::CONTROL_PACKET => with_data(10, "10 or more"),
        PacketType::BULK_PACKET if caps.has(Caps::LONG_BULK) => with_data(10, "10 or more"),
        PacketType::BULK_PACKET => with_data(8, "8 or more"),
        PacketType::INTERRUPT_PACKET => with_data(4, "4 or more"),
        _ => (0, None),
    };
    if let (PacketType::HELLO, Some(expected)) = (kind, expected) {
        return Err(DecodeError::Length { kind, length, expected });
    }
    Ok(Plan { kind, id, length, keep, skip: all - keep, expected })
}

/// Reads what was kept, which is as long as the plan says.
fn finish(plan: Plan, rest: &[u8], caps: Caps) -> Result<Request, DecodeError> {
    let Plan { kind, id, length, expected, .. } = plan;
    if let Some(expected) = expected {
        return Err(DecodeError::Length { kind, length, expected });
    }
    let body = match (kind, rest) {
        (PacketType::HELLO, rest) => {
            let (version, words) = rest.split_at(VERSION.min(rest.len()));
            // A peer without any capability may send no word at all.
            let caps = words.first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
            RequestBody::Hello { caps: Caps(caps), version: printable(version) }
        }
        (PacketType::RESET, _) => RequestBody::Reset,
        (PacketType::GET_CONFIGURATION, _) => RequestBody::GetConfiguration,
        (PacketType::CANCEL_DATA_PACKET, _) => RequestBody::Cancel,
        (PacketType::FILTER_REJECT, _) => RequestBody::FilterReject,
        (PacketType::FILTER_FILTER, _) => RequestBody::Filter,
        (PacketType::DEVICE_DISCONNECT_ACK, _) => RequestBody::DisconnectAck,
        (PacketType::SET_CONFIGURATION, &[value]) => RequestBody::SetConfiguration(value),
        (PacketType::GET_ALT_SETTING, &[interface]) => RequestBody::GetAltSetting { interface },
        (PacketType::SET_ALT_SETTING, &[interface, alt]) => RequestBody::SetAltSetting { interface, alt },
        (PacketType::START_INTERRUPT_RECEIVING, &[endpoint]) => {
            RequestBody::StartInterruptReceiving { endpoint }
        }
        (PacketType::STOP_INTERRUPT_RECEIVING, &[endpoint]) => {
            RequestBody::StopInterruptReceiving { endpoint }
        }
        (
            PacketType::CONTROL_PACKET,
            &[endpoint, request, request_type, _, v0, v1, i0, i1, l0, l1, ref data @ ..],
        ) => {
            let value = u16::from_le_bytes([v0, v1]);
            let index = u16::from_le_bytes([i0, i1]);
            let length = u16::from_le_bytes([l0, l1]);
            agrees(kind, caps.header() + 8, endpoint, length.into(), plan.data(10))?;
            let header = Control { endpoint, request, request_type, value, index, length };
            RequestBody::Control(header, Secret::from(data))
        }
        (PacketType::BULK_PACKET, &[endpoint, _, l0, l1, s0, s1, s2, s3, ref rest @ ..]) => {
            let ([l2, l3], data) = match rest {
                [l2, l3, data @ ..] if caps.has(Caps::LONG_BULK) => ([*l2, *l3], data),
                data => ([0, 0], data),
            };
            let length = u32::from_le_bytes([l0, l1, l2, l3]);
            let there = plan.data(caps.bulk_header());
            agrees(kind, caps.header() + 2, endpoint, length, there)?;
            let transfer = match endpoint & 0x80 {
                0 if there > MAX_DATA => Transfer::OutTooLong,
                0 => Transfer::Out(Secret::from(data)),
                _ => Transfer::In(length),
            };
            let stream = u32::from_le_bytes([s0, s1, s2, s3]);
            RequestBody::Bulk { endpoint, stream, transfer }
        }
        (PacketType::INTERRUPT_PACKET, &[endpoint, _, l0, l1, ..]) => {
            let length = u16::from_le_bytes([l0, l1]);
            agrees(kind, caps.header() + 2, endpoint, length.into(), plan.data(4))?;
            RequestBody::Interrupt { endpoint }
        }
        (other, _) => RequestBody::Other(other),
    };
    Ok(Request { id, body })
}

/// OUT brings as much data as it says, IN none.
fn agrees(
    kind: PacketType,
    offset: usize,
    endpoint: u8,
    length: u32,
    data: usize,
) -> Result<(), DecodeError> {
    let wanted = if endpoint & 0x80 == 0 { length as usize } else { 0 };
    if data == wanted { Ok(()) } else { Err(DecodeError::Data { kind, offset, endpoint, length, data }) }
}

/// For a log: up to the first NUL, and nothing that a terminal would obey.
fn printable(version: &[u8]) -> String {
    let end = version.iter().position(|byte| *byte == 0).unwrap_or(version.len());
    let shown = |byte: &u8| if (0x20..0x7F).contains(byte) { char::from(*byte) } else { '?' };
    version.iter().take(end).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the guest's side writes.
    fn write(Request { id, body }: &Request, caps: Caps) -> Vec<u8> {
        let bulk = |endpoint: u8, stream: u32, length: u32, data: &[u8]| {
            let mut bytes = Vec::new();
            put_bulk(&mut bytes, endpoint, stream, Status::SUCCESS, length, caps);
            bytes.extend(data);
            bytes
        };
        let (kind, body) = match body {
            RequestBody::Hello { caps, version } => {
                let mut bytes = version.clone().into_bytes();
                bytes.resize(64, 0);
                bytes.extend(caps.0.to_le_bytes());
                (PacketType::HELLO, bytes)
            }
            RequestBody::Reset => (PacketType::RESET, vec![]),
            RequestBody::SetConfiguration(value) => (PacketType::SET_CONFIGURATION, vec![*value]),
            RequestBody::GetConfiguration => (PacketType::GET_CONFIGURATION, vec![]),
            RequestBody::SetAltSetting { interface, alt } => {
                (PacketType::SET_ALT_SETTING, vec![*interface, *alt])
            }
            RequestBody::GetAltSetting { interface } => (PacketType::GET_ALT_SETTING, vec![*interface]),
            RequestBody::StartInterruptReceiving { endpoint } => {
                (PacketType::START_INTERRUPT_RECEIVING, vec![*endpoint])
            }
            RequestBody::StopInterruptReceiving { endpoint } => {
                (PacketType::STOP_INTERRUPT_RECEIVING, vec![*endpoint])
            }
            RequestBody::Cancel => (PacketType::CANCEL_DATA_PACKET, vec![]),
            RequestBody::FilterReject => (PacketType::FILTER_REJECT, vec![]),
            RequestBody::Filter => (PacketType::FILTER_FILTER, b"-1:-1:-1:-1:1\0".to_vec()),
            RequestBody::DisconnectAck => (PacketType::DEVICE_DISCONNECT_ACK, vec![]),
            RequestBody::Control(header, data) => {
                let mut bytes = Vec::new();
                put_control(&mut bytes, *header, Status::SUCCESS);
                bytes.extend(data.expose());
                (PacketType::CONTROL_PACKET, bytes)
            }
            RequestBody::Bulk { endpoint, stream, transfer } => {
                let bytes = match transfer {
                    Transfer::In(length) => bulk(*endpoint, *stream, *length, &[]),
                    Transfer::Out(data) => bulk(*endpoint, *stream, data.len() as u32, data.expose()),
                    Transfer::OutTooLong => {
                        bulk(*endpoint, *stream, MAX_DATA as u32 + 1, &vec![0x5A; MAX_DATA + 1])
                    }
                };
                (PacketType::BULK_PACKET, bytes)
            }
            RequestBody::Interrupt { endpoint } => {
                let data: &[u8] = if endpoint & 0x80 == 0 { &[1, 2, 3] } else { &[] };
                let mut bytes = vec![*endpoint, 0, 3, 0];
                bytes.extend(data);
                (PacketType::INTERRUPT_PACKET, bytes)
            }
            RequestBody::Other(kind) => (*kind, b"something".to_vec()),
        };
        let mut bytes = kind.0.to_le_bytes().to_vec();
        bytes.extend((body.len() as u32).to_le_bytes());
        let id = id.to_le_bytes();
        let width = if kind != PacketType::HELLO && caps.has(Caps::WIDE_IDS) { 8 } else { 4 };
        bytes.extend(&id[..width]);
        bytes.extend(body);
        bytes
    }

    fn body() -> impl Strategy<Value = RequestBody> {
        let data = |most| proptest::collection::vec(any::<u8>(), 0..most).prop_map(Secret::new);
        prop_oneof![
            Just(RequestBody::Reset),
            any::<u8>().prop_map(RequestBody::SetConfiguration),
            Just(RequestBody::GetConfiguration),
            any::<(u8, u8)>().prop_map(|(interface, alt)| RequestBody::SetAltSetting { interface, alt }),
            any::<u8>().prop_map(|interface| RequestBody::GetAltSetting { interface }),
            any::<u8>().prop_map(|endpoint| RequestBody::StartInterruptReceiving { endpoint }),
            any::<u8>().prop_map(|endpoint| RequestBody::StopInterruptReceiving { endpoint }),
            Just(RequestBody::Cancel),
            Just(RequestBody::FilterReject),
            Just(RequestBody::Filter),
            Just(RequestBody::DisconnectAck),
            (any::<(u8, u8, u8)>(), any::<(u16, u16, u16)>(), data(300)).prop_map(
                |((endpoint, request, request_type), (value, index, length), data)| {
                    let is_in = endpoint & 0x80 != 0;
                    let (length, data) =
                        if is_in { (length, Secret::default()) } else { (data.len() as u16, data) };
                    RequestBody::Control(
                        Control { endpoint, request, request_type, value, index, length },
                        data,
                    )
                }
            ),
            (0u8..0x80, any::<u32>(), data(300)).prop_map(|(endpoint, stream, data)| RequestBody::Bulk {
                endpoint,
                stream,
                transfer: Transfer::Out(data)
            }),
            (0x80u8.., any::<u32>(), any::<u16>()).prop_map(|(endpoint, stream, length)| RequestBody::Bulk {
                endpoint,
                stream,
                transfer: Transfer::In(length.into())
            }),
            any::<u8>().prop_map(|endpoint| RequestBody::Interrupt { endpoint }),
            prop_oneof![Just(1u32), 4u32..6, 12u32..15, 18u32..21, 104u32..]
                .prop_map(|kind| RequestBody::Other(PacketType(kind))),
        ]
    }

    fn decode_all(caps: Option<Caps>, wire: &[u8], cut: usize) -> Vec<Result<Request, DecodeError>> {
        let mut decoder = Decoder::new();
        caps.into_iter().for_each(|caps| decoder.agree(caps));
        let mut found = Vec::new();
        for mut piece in wire.chunks(cut) {
            while let Some(request) = decoder.decode(&mut piece) {
                let fatal = request.as_ref().is_err_and(DecodeError::is_fatal);
                found.push(request);
                assert!(decoder.buffer.capacity() <= MAX_DATA + 64);
                if fatal {
                    return found;
                }
            }
            assert!(piece.is_empty());
            assert!(decoder.buffer.capacity() <= MAX_DATA + 64);
        }
        found
    }

    #[test]
    fn bytes_of_the_wire() {
        let hello = encode(0, &Reply::Hello, Caps::OURS);
        assert_eq!(hello.expose()[..12], [0, 0, 0, 0, 68, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(hello.expose()[76..], [0x7E, 0, 0, 0]);
        assert_eq!(hello.len(), 80);

        let ours = |reply: &Reply<'_>| encode(66_975_744, reply, Caps::OURS).expose().to_vec();
        let header = |kind, length| [kind, 0, 0, 0, length, 0, 0, 0, 0, 0xF8, 0xFD, 3, 0, 0, 0, 0].to_vec();
        let device =
            DeviceConnect { speed: 2, class: [0; 3], vendor: 0x08E6, product: 0x4433, version: 0x100 };
        assert_eq!(
            ours(&Reply::DeviceConnect(device)),
            [header(1, 10), vec![2, 0, 0, 0, 0xE6, 0x08, 0x33, 0x44, 0, 1]].concat()
        );
        assert_eq!(
            ours(&Reply::ConfigurationStatus { status: Status::SUCCESS, configuration: 1 }),
            [header(8, 2), vec![0, 1]].concat()
        );
        let header_in =
            Control { endpoint: 0x80, request: 6, request_type: 0x81, value: 0x0203, index: 4, length: 2 };
        assert_eq!(
            ours(&Reply::Control { header: header_in, status: Status::SUCCESS, data: &[7, 8] }),
            [header(100, 12), vec![0x80, 6, 0x81, 0, 3, 2, 4, 0, 2, 0, 7, 8]].concat(),
            "the request before its type"
        );
        let bulk = Reply::BulkIn { endpoint: 0x81, stream: 0, status: Status::STALL, data: &[] };
        assert_eq!(ours(&bulk), [header(101, 10), vec![0x81, 4, 0, 0, 0, 0, 0, 0, 0, 0]].concat());
        let long = Reply::BulkOut { endpoint: 1, stream: 2, status: Status::SUCCESS, length: 65_554 };
        assert_eq!(ours(&long), [header(101, 10), vec![1, 0, 0x12, 0, 2, 0, 0, 0, 1, 0]].concat());
        let notify = Reply::InterruptIn { endpoint: 0x82, status: Status::SUCCESS, data: &[0x50, 3] };
        assert_eq!(ours(&notify), [header(103, 6), vec![0x82, 0, 2, 0, 0x50, 3]].concat());

        // Without any capability.
        assert_eq!(
            encode(5, &bulk, Caps::default()).expose(),
            [101, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 0x81, 4, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(encode(0, &Reply::DeviceConnect(device), Caps::default()).len(), 12 + 8);
        assert_eq!(encode(0, &Reply::EpInfo(&EpInfo::new(64)), Caps::default()).len(), 12 + 96);
        assert_eq!(encode(0, &Reply::EpInfo(&EpInfo::new(64)), Caps::OURS).len(), 16 + 160);
        assert_eq!(encode(0, &Reply::InterfaceInfo(&InterfaceInfo::default()), Caps::OURS).len(), 16 + 132);
    }

    #[test]
    fn places_of_endpoints() {
        let mut info = EpInfo::new(64);
        let place = |interface| EpPlace { kind: 2, interval: 0, interface, max_packet_size: 512 };
        info.set(0x01, place(1));
        info.set(0x8F, place(2));
        assert_eq!((info.0[1], info.0[31]), (place(1), place(2)));
        assert_eq!((info.0[0].kind, info.0[16].kind, info.0[2].kind), (0, 0, 255));
    }

    #[test]
    fn a_transfer_too_long_is_passed_over() {
        let body = RequestBody::Bulk { endpoint: 1, stream: 0, transfer: Transfer::OutTooLong };
        let mut wire = write(&Request { id: 1, body }, Caps::OURS);
        wire.extend(write(&Request { id: 2, body: RequestBody::Cancel }, Caps::OURS));
        let found = decode_all(Some(Caps::OURS), &wire, 1000);
        let [Ok(first), Ok(second)] = &found[..] else { panic!("{found:?}") };
        assert!(matches!(first.body, RequestBody::Bulk { transfer: Transfer::OutTooLong, .. }));
        assert!(matches!(second, Request { id: 2, body: RequestBody::Cancel }));
    }

    #[test]
    fn a_version_is_shown_without_what_a_terminal_would_obey() {
        let body = RequestBody::Hello { caps: Caps(0xFF), version: "\u{1B}[2J\n qemu".to_owned() };
        let found = decode_all(None, &write(&Request { id: 0, body }, Caps::OURS), 7);
        let [Ok(Request { body: RequestBody::Hello { caps, version }, .. })] = &found[..] else { panic!() };
        assert_eq!((*caps, version.as_str()), (Caps(0xFF), "?[2J? qemu"));
    }

    proptest! {
        #[test]
        fn packets_survive_the_wire_however_it_is_cut(
            caps in any::<u32>(), id in any::<u64>(), bodies in proptest::collection::vec(body(), 1..6),
            cut in 1usize..80,
        ) {
            let caps = Caps::OURS.and(Caps(caps));
            let id = if caps.has(Caps::WIDE_IDS) { id } else { id & 0xFFFF_FFFF };
            let requests: Vec<_> = bodies.into_iter().map(|body| Request { id, body }).collect();
            let wire: Vec<u8> = requests.iter().flat_map(|request| write(request, caps)).collect();
            let again: Vec<u8> = decode_all(Some(caps), &wire, cut)
                .into_iter()
                .flat_map(|request| write(&request.unwrap(), caps))
                .collect();
            prop_assert_eq!(again, wire);
        }

        #[test]
        fn any_bytes_are_packets_or_errors(
            caps in any::<Option<u32>>(), bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 1usize..80,
        ) {
            decode_all(caps.map(|caps| Caps::OURS.and(Caps(caps))), &bytes, cut);
        }

        #[test]
        fn any_framed_bytes_are_as_many_packets_or_errors(
            caps in any::<u32>(),
            frames in proptest::collection::vec(
                (prop_oneof![1u32..28, 100u32..105], proptest::collection::vec(any::<u8>(), 0..40)), 0..20,
            ),
            cut in 1usize..80,
        ) {
            let caps = Caps::OURS.and(Caps(caps));
            let mut wire = Vec::new();
            for (kind, body) in &frames {
                wire.extend(kind.to_le_bytes());
                wire.extend((body.len() as u32).to_le_bytes());
                wire.resize(wire.len() + caps.header() - 8, 7);
                wire.extend(body);
            }
            prop_assert_eq!(decode_all(Some(caps), &wire, cut).len(), frames.len());
        }
    }
}
