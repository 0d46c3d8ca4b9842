//! A connection before a device is imported.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::config::Speed;
use crate::descriptor::{Endpoint, Topology};

/// Version 1.1.1, the only one there is.
const VERSION: u16 = 0x0111;
const REQ_DEVLIST: u16 = 0x8005;
const REQ_IMPORT: u16 = 0x8003;
/// What a request's code has and its reply's has not.
const REQUEST: u16 = 0x8000;
/// Version, code and status.
const COMMON: usize = 8;
const BUSID: usize = 32;
const PATH: usize = 256;
/// The number of the one bus that all devices are on.
const BUS: u32 = 1;

/// How long a client may take for its one request.
const REQUEST_WAIT: Duration = Duration::from_secs(30);
/// How long the client that has a device may take to show that it is gone, before another one is refused. The reset
/// of its connection comes within a round trip.
pub(crate) const GONE_WAIT: Duration = Duration::from_secs(3);

/// Status words of replies; clients take any but 0 for a refusal.
const OK: u32 = 0;
const NOT_AVAILABLE: u32 = 1;
const BUSY: u32 = 2;
const NO_DEVICE: u32 = 4;

/// A device as clients see it before they import it.
#[derive(Clone, Debug)]
pub struct Export {
    number: u16,
    topology: Topology,
    imported: bool,
    plugged: bool,
}

impl Export {
    /// A device with the bus id `1-<number>`. No two exports of a server may have the same number.
    pub fn new(number: u16, topology: Topology) -> Self {
        Self { number, topology, imported: false, plugged: true }
    }

    /// What clients ask for: `usbip attach -r HOST -b 1-1`.
    pub fn busid(&self) -> String {
        format!("1-{}", self.number)
    }

    /// Says whether a client has it; no other client can see or import it meanwhile.
    pub fn set_imported(&mut self, imported: bool) {
        self.imported = imported;
    }

    /// Says whether it is plugged in, as it is from the start; otherwise no client can see or import it.
    pub fn set_plugged(&mut self, plugged: bool) {
        self.plugged = plugged;
    }

    /// What transfers to the device carry: bus and device number.
    pub(super) fn devid(&self) -> u32 {
        BUS << 16 | u32::from(self.number)
    }

    pub(super) fn endpoints(&self) -> impl Iterator<Item = Endpoint> {
        self.topology.interfaces.iter().flat_map(|interface| interface.endpoints)
    }

    fn record(&self, out: &mut Vec<u8>) {
        let Topology { vendor_id, product_id, device_version, class, speed, configuration, .. } =
            self.topology;
        let busid = self.busid();
        let mut text = |text: &str, length: usize| {
            let end = out.len() + length;
            out.extend_from_slice(text.as_bytes());
            out.resize(end, 0);
        };
        text(&format!("/sys/devices/ccid-device/usb{BUS}/{busid}"), PATH);
        text(&busid, BUSID);
        // The kernel's enumeration; `vhci-hcd` chooses its port by it.
        let speed: u32 = match speed {
            Speed::Full => 2,
            Speed::High => 3,
        };
        [BUS, u32::from(self.number), speed]
            .iter()
            .for_each(|word| out.extend_from_slice(&word.to_be_bytes()));
        let ids = [vendor_id, product_id, device_version];
        ids.iter().for_each(|word| out.extend_from_slice(&word.to_be_bytes()));
        out.extend_from_slice(&class);
        // One configuration; seven interfaces at most.
        out.extend_from_slice(&[configuration, 1, self.topology.interfaces.len() as u8]);
    }
}

/// What a [`Management`] wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Write these bytes.
    Send(Vec<u8>),
    /// The client has this device, by its index in the exports: [mark it](Export::set_imported), and go on with
    /// [`Urbs`](super::Urbs), beginning with the bytes that were not taken. Nothing comes after this.
    Import(usize),
    /// The client wants this device, which another one has, or had before its machine was reset: have that one
    /// [asked](super::urbs::Input::AskPeer), and call [`handle`](Management::handle), without bytes, if its
    /// connection ends. Until then no more is to be read.
    Ask(usize),
    /// Write what is to be written, then close the stream. Nothing comes after this.
    Close(CloseReason),
}

/// Why a connection ends before a device is imported.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CloseReason {
    /// The client has the list it asked for.
    #[error("the list of devices was sent")]
    Listed,
    /// The client speaks another version.
    #[error("version at offset 0 of the request is {0:#06x}, expected {VERSION:#06x}")]
    Version(u16),
    /// The client asks for something else.
    #[error("code at offset 2 of the request is {0:#06x}, neither DEVLIST nor IMPORT")]
    UnknownRequest(u16),
    /// The client wants a device that another one has.
    #[error("device {0} is in use by another client")]
    Busy(String),
    /// The client wants a device that is not plugged in.
    #[error("device {0} is unplugged")]
    Unplugged(String),
    /// The client wants a device that does not exist.
    #[error("there is no device {0:?}")]
    NoSuchDevice(String),
    /// The client asks for nothing.
    #[error("no request within {n} s", n = REQUEST_WAIT.as_secs())]
    TimedOut,
}

/// One connection up to its first request, which decides what it is for.
pub struct Management {
    request: [u8; COMMON + BUSID],
    /// Bytes of the request that have come.
    filled: usize,
    output: VecDeque<Output>,
    /// It is for a device that another client has.
    waiting: bool,
    /// By when the request must be complete, or the device free; `None` when it has been answered.
    deadline: Option<Instant>,
}

impl Management {
    /// A connection that was just accepted.
    pub fn new(now: Instant) -> Self {
        Self {
            request: [0; COMMON + BUSID],
            filled: 0,
            output: VecDeque::new(),
            waiting: false,
            deadline: Some(now + REQUEST_WAIT),
        }
    }

    /// Takes bytes from the front of `received` up to the end of the request; what is left belongs to the URB
    /// phase, or to nobody.
    pub fn handle(&mut self, received: &mut &[u8], exports: &[Export], now: Instant) {
        if self.deadline.is_none() || !self.fill(COMMON, received) {
            return;
        }
        let [v, e, c, o, ..] = self.request;
        let (version, code) = (u16::from_be_bytes([v, e]), u16::from_be_bytes([c, o]));
        if version != VERSION {
            return self.refuse(code, NOT_AVAILABLE, CloseReason::Version(version));
        }
        match code {
            REQ_DEVLIST => self.list(exports),
            REQ_IMPORT if self.fill(COMMON + BUSID, received) => self.import(exports, now),
            REQ_IMPORT => {}
            _ => self.refuse(code, NOT_AVAILABLE, CloseReason::UnknownRequest(code)),
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.output.pop_front()
    }

    /// Whether the request is complete and waits for a device to become free: [`Output::Ask`].
    pub fn is_waiting(&self) -> bool {
        self.waiting && self.deadline.is_some()
    }

    /// When [`handle_deadline`](Self::handle_deadline) is to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Does what is due at `now`.
    pub fn handle_deadline(&mut self, now: Instant) {
        if self.deadline.is_none_or(|at| now < at) {
            return;
        }
        if self.waiting {
            self.refuse(REQ_IMPORT, BUSY, CloseReason::Busy(self.wanted()));
        } else {
            self.finish(Output::Close(CloseReason::TimedOut));
        }
    }

    /// Whether the request's first `length` bytes are there.
    fn fill(&mut self, length: usize, received: &mut &[u8]) -> bool {
        if let Some(room) = self.request.get_mut(self.filled..length) {
            let (now, later) = received.split_at(room.len().min(received.len()));
            room.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
            self.filled += now.len();
            *received = later;
        }
        self.filled >= length
    }

    fn list(&mut self, exports: &[Export]) {
        // As the kernel's usbipd does: what is imported cannot be had, and is no other client's concern.
        let free = || exports.iter().filter(|export| export.plugged && !export.imported);
        let mut reply = common(REQ_DEVLIST, OK);
        reply.extend_from_slice(&(free().count() as u32).to_be_bytes());
        for export in free() {
            export.record(&mut reply);
            for interface in &export.topology.interfaces {
                reply.extend_from_slice(&interface.class);
                reply.push(0);
            }
        }
        self.output.push_back(Output::Send(reply));
        self.finish(Output::Close(CloseReason::Listed));
    }

    /// The bus id of an import's request.
    fn wanted(&self) -> String {
        let busid = self.request.get(COMMON..).unwrap_or_default();
        String::from_utf8_lossy(busid.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
    }

    fn import(&mut self, exports: &[Export], now: Instant) {
        let wanted = self.wanted();
        match exports.iter().enumerate().find(|(_, export)| export.busid() == wanted) {
            None => self.refuse(REQ_IMPORT, NO_DEVICE, CloseReason::NoSuchDevice(wanted)),
            Some((_, export)) if !export.plugged => {
                self.refuse(REQ_IMPORT, NOT_AVAILABLE, CloseReason::Unplugged(wanted));
            }
            Some((_, export)) if export.imported && self.waiting => {}
            Some((index, export)) if export.imported => {
                self.waiting = true;
                self.deadline = Some(now + GONE_WAIT);
                self.output.push_back(Output::Ask(index));
            }
            Some((index, export)) => {
                let mut reply = common(REQ_IMPORT, OK);
                export.record(&mut reply);
                self.output.push_back(Output::Send(reply));
                self.finish(Output::Import(index));
            }
        }
    }

    fn refuse(&mut self, request: u16, status: u32, reason: CloseReason) {
        self.output.push_back(Output::Send(common(request, status)));
        self.finish(Output::Close(reason));
    }

    fn finish(&mut self, last: Output) {
        self.deadline = None;
        self.output.push_back(last);
    }
}

/// What every reply begins with, ours always with our version.
fn common(request: u16, status: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(COMMON);
    out.extend_from_slice(&VERSION.to_be_bytes());
    out.extend_from_slice(&(request & !REQUEST).to_be_bytes());
    out.extend_from_slice(&status.to_be_bytes());
    out
}
