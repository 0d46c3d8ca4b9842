//! A device's session with a guest, and the connections it runs on.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use thiserror::Error;
use vscard_protocol::{Secret, Validity};

use super::codec::{
    Caps, Control, DecodeError, Decoder, DeviceConnect, EpInfo, EpPlace, InterfaceInfo, PacketType, Reply,
    Request, RequestBody, Status, Transfer, encode,
};
use super::endpoint::{BulkIn, InterruptIn, MOST_PENDING, Pending};
use super::unread::Unread;
use super::waiting::{First, MOST_HELD, MOST_WAITING, Said, Waiting};
use crate::usbip::management::GONE_WAIT;
use crate::{ControlOutcome, Device, EndpointKind, InOutcome, Setup, Speed, Topology, TransferOutcome};

/// Bytes that may wait in [`Session::poll_output`]. A peer that does not read what it asked for is left.
const MOST_OUTPUT: usize = 4 << 20;
/// Notifications sent to one endpoint at a time.
const MOST_NOTIFICATIONS: usize = 16;

/// A VMM that has read nothing for so long does not run its VM: one that does reads at once.
const STOPPED_FOR: Duration = Duration::from_millis(100);
/// How long a VMM may take to acknowledge that the device is gone.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(1);
/// An address that is never an interrupt endpoint of ours, so that QEMU passes over what is said of it.
const NO_ENDPOINT: u8 = 0x83;

/// Names a connection; chosen by the caller, never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

/// What happens to a [`Session`].
pub enum Input<'a> {
    /// There is a connection, made or accepted. Nothing is sent before its first packet.
    Connected(ConnectionId),
    /// Bytes from the peer, 64 KiB at most; the output is to be written before the next are read.
    Received(ConnectionId, &'a [u8]),
    /// The connection is gone.
    Lost(ConnectionId),
    /// The peer has read since [`Output::Fill`], or there was no filling its connection.
    Reads(ConnectionId),
    /// The device may have something for the guest.
    DeviceReady,
}

/// What a [`Session`] wants done.
#[derive(Debug)]
pub enum Output {
    /// Write these bytes, in one piece.
    Send(ConnectionId, Secret),
    /// Write these bytes, which a VMM passes over, again and again until the connection takes no more; then tell, with
    /// [`Input::Reads`], as soon as it takes more. Only a session that [may migrate](Session::migrating) wants this.
    Fill(ConnectionId, Secret),
    /// Write what is to be written, then close the connection. Nothing comes for it after this.
    Close(ConnectionId, CloseReason),
    /// Tell the user.
    Notice(Notice),
}

/// News about a session.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Notice {
    /// A new session.
    #[error("connected to {version:?}")]
    Connected {
        /// What the peer says it is.
        version: String,
    },
    /// The peer is too old for some controllers.
    #[error("the VMM's usbredir is old: only a UHCI or EHCI controller takes the reader")]
    OldPeer,
    /// The guest came over from another connection.
    #[error("the guest has migrated here and goes on")]
    Continued,
    /// The connection in use is gone, and with it the session.
    #[error("connection lost")]
    Lost,
    /// The connection in use is gone; the session stays for one that was there already.
    #[error("connection lost; the session is kept for the connection that waits")]
    Kept,
    /// The guest's side does not take the device.
    #[error("the VMM refused the reader: a filter, or a controller of another speed")]
    Rejected,
    /// A packet that no guest's side sends, or that makes no sense now.
    #[error("unexpected {0} packet from the VMM ignored")]
    Unexpected(PacketType),
    /// A packet that cannot be read.
    #[error("packet ignored: {0}")]
    BadPacket(DecodeError),
    /// A request to an endpoint that cannot do it; it was refused.
    #[error("{kind} packet to endpoint {endpoint:#04x}, which cannot do that, refused")]
    BadEndpoint {
        /// Type of the packet.
        kind: PacketType,
        /// The endpoint's address.
        endpoint: u8,
    },
    /// A transfer longer than any message; it was refused.
    #[error("transfer to endpoint {endpoint:#04x} refused: too long")]
    TooLong {
        /// The endpoint's address.
        endpoint: u8,
    },
    /// An IN transfer beyond what may wait; it was refused.
    #[error("more than {MOST_PENDING} transfers wait at endpoint {endpoint:#04x}; refused")]
    TooManyPending {
        /// The endpoint's address.
        endpoint: u8,
    },
}

/// Why a connection is closed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CloseReason {
    /// It has said nothing for longer than the others that wait.
    #[error("it has said nothing, and another one came")]
    Silent,
    /// It said too much before there was a session for it.
    #[error("more than {MOST_HELD} bytes without waiting for an answer")]
    TooMuch,
    /// The first packet is no hello, and there is no session that it could continue.
    #[error("the first packet is no usbredir hello, and there is no session that it could continue")]
    NotHello,
    /// Another VMM has the reader.
    #[error("another VMM has the reader")]
    InUse,
    /// It would continue the session of a guest that still runs elsewhere.
    #[error("the VMM that has the reader still runs its guest")]
    StillRuns,
    /// A second hello.
    #[error("a second hello in one connection")]
    SecondHello,
    /// Another connection continues the session.
    #[error("the guest has migrated")]
    Migrated,
    /// The VMM does not acknowledge that the device is gone.
    #[error("the VMM does not acknowledge the unplugging; its virtual machine may be paused")]
    NotAcknowledged,
    /// The stream cannot be followed.
    #[error("cannot follow the VMM: {0}")]
    Decode(DecodeError),
    /// The peer asks without reading the answers.
    #[error("the VMM does not read what it asked for")]
    NotRead,
}

/// One device's side of usbredir: a session with a guest on one connection, and connections that wait.
///
/// The shell passes connections' events in, and does what [`poll_output`](Self::poll_output) says after each call.
///
/// ```
/// use std::time::Instant;
/// use ccid_device::usbredir::{ConnectionId, Input, Output, Session};
/// use ccid_device::{Device, DeviceConfig};
///
/// let now = Instant::now();
/// let mut device = Device::new(DeviceConfig::new("vm1"))?;
/// let mut session = Session::new();
/// session.handle(Input::Connected(ConnectionId(1)), &mut device, now);
/// assert!(session.poll_output().is_none(), "the guest's side speaks first");
///
/// // Its hello: type 0, 68 bytes, id 0, version, capabilities.
/// let mut hello = vec![0; 80];
/// hello[4] = 68;
/// hello[76] = 0x7E;
/// session.handle(Input::Received(ConnectionId(1), &hello), &mut device, now);
/// let sent = std::iter::from_fn(|| session.poll_output()).filter(|output| matches!(output, Output::Send(..)));
/// assert_eq!(sent.count(), 4, "hello, ep_info, interface_info, device_connect");
/// # Ok::<(), ccid_device::ConfigError>(())
/// ```
pub struct Session {
    output: VecDeque<Output>,
    /// Bytes in `output`.
    output_bytes: usize,
    /// Whether a guest may take its session along to another connection.
    migrate: bool,
    /// Connections that have no session, oldest first.
    waiting: Vec<Waiting>,
    active: Option<ConnectionId>,
    /// The one in use was sent what makes the network tell if its machine is gone, and has said nothing since.
    asked: bool,
    /// The one in use was filled, and has not been read since.
    filled: bool,
    /// What the guest's side and we have agreed on. It outlives its connection only while an heir waits.
    guest: Option<Guest>,
    plugged: bool,
    /// How often a guest got the device.
    attachments: u64,
}

/// Whether a device is attached to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attachment {
    None,
    Attached,
    /// The guest's side has been told, and is to acknowledge, by then if it had the device.
    Leaving(Option<Instant>),
    /// Refused; another attempt would end the same way.
    Rejected,
}

/// A session with a guest.
struct Guest {
    decoder: Decoder,
    /// What both can, once the hello has come.
    caps: Option<Caps>,
    topology: Topology,
    attachment: Attachment,
    bulk_in: Vec<BulkIn>,
    interrupts: Vec<InterruptIn>,
    unread: Unread,
}

impl Guest {
    fn new(topology: Topology) -> Self {
        let of_kind = |kind| {
            let endpoints = topology.interfaces.iter().flat_map(|interface| interface.endpoints);
            endpoints.filter(move |endpoint| endpoint.kind == kind && is_in(endpoint.address))
        };
        Self {
            decoder: Decoder::new(),
            caps: None,
            attachment: Attachment::None,
            bulk_in: of_kind(EndpointKind::Bulk).map(|endpoint| BulkIn::new(endpoint.address)).collect(),
            interrupts: of_kind(EndpointKind::Interrupt)
                .map(|endpoint| InterruptIn::new(endpoint.address))
                .collect(),
            topology,
            unread: Unread::default(),
        }
    }

    fn is_bulk_out(&self, address: u8) -> bool {
        let mut endpoints = self.topology.interfaces.iter().flat_map(|interface| interface.endpoints);
        endpoints.any(|place| place.address == address && place.kind == EndpointKind::Bulk && !is_in(address))
    }

    /// Whether the endpoint belongs to that interface.
    fn is_of_interface(&self, address: u8, number: u16) -> bool {
        let mut interfaces = self.topology.interfaces.iter();
        interfaces.any(|interface| {
            u16::from(interface.number) == number
                && interface.endpoints.iter().any(|endpoint| endpoint.address == address)
        })
    }
}

/// Whether an endpoint's address, or a request's type, is of the direction towards the guest (USB 2.0 §9.6.6).
fn is_in(address: u8) -> bool {
    address & 0x80 != 0
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A session without a guest and without a connection, with its device plugged in. It ends with its connection.
    pub fn new() -> Self {
        Self {
            output: VecDeque::new(),
            output_bytes: 0,
            migrate: false,
            waiting: Vec::new(),
            active: None,
            asked: false,
            filled: false,
            guest: None,
            plugged: true,
            attachments: 0,
        }
    }

    /// A session that goes on where the guest goes: on a connection that waited in silence until the one in use ended,
    /// or until its peer did not read any more, which is what a VMM does whose VM has stopped.
    ///
    /// Whoever can connect can so go on with the session of a VM that is paused. This is for connections whose peers
    /// are known, and where [`Output::Fill`] can be done.
    pub fn migrating() -> Self {
        Self { migrate: true, ..Self::new() }
    }

    /// Takes what happened at `now`.
    pub fn handle(&mut self, input: Input<'_>, device: &mut Device, now: Instant) {
        match input {
            Input::Connected(connection) => self.connected(connection),
            Input::Received(connection, bytes) => self.received(connection, bytes, device, now),
            Input::Lost(connection) => self.lost(connection, device, now),
            Input::Reads(connection) => self.reads(connection),
            Input::DeviceReady => {}
        }
        self.admit(device, now);
        self.serve(device, now);
        self.check_output(device, now);
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        let output = self.output.pop_front()?;
        if let Output::Send(_, bytes) = &output {
            self.output_bytes -= bytes.len();
        }
        Some(output)
    }

    /// When [`handle_deadline`](Self::handle_deadline) is to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let endpoints = self.guest.iter().flat_map(|guest| &guest.bulk_in);
        let waiting = self.waiting.iter().filter_map(Waiting::deadline);
        endpoints.filter_map(BulkIn::next_deadline).chain(waiting).chain(self.leaving_until()).min()
    }

    /// Does what is due at `now`: old answers are wiped, who waited for long enough is refused or goes on, and who does
    /// not acknowledge that the device is gone is left.
    pub fn handle_deadline(&mut self, device: &mut Device, now: Instant) {
        for endpoint in self.guest.iter_mut().flat_map(|guest| &mut guest.bulk_in) {
            endpoint.expire(now);
        }
        if self.leaving_until().is_some_and(|until| until <= now) {
            self.abandon(CloseReason::NotAcknowledged, device, now);
        }
        while let Some(index) = self.waiting.iter().position(|it| it.deadline().is_some_and(|by| by <= now)) {
            match self.waiting.get(index).map(|waiting| waiting.said) {
                // Nothing of what fills the other connection has been read.
                Some(Said::Packet(_)) if self.filled => self.go_on(index, device, now),
                _ => {
                    let waiting = self.waiting.remove(index);
                    self.close(waiting.connection, CloseReason::InUse);
                }
            }
        }
        self.admit(device, now);
        self.serve(device, now);
    }

    /// Whether a guest has the device, as far as is known.
    pub fn is_attached(&self) -> bool {
        self.guest.as_ref().is_some_and(|guest| guest.attachment == Attachment::Attached)
    }

    /// How often a guest has got the device: it is another one's, or the same one's anew, when this has changed.
    pub fn attachments(&self) -> u64 {
        self.attachments
    }

    /// Whether a guest had the device, and its side has not acknowledged that it is gone.
    pub fn is_leaving(&self) -> bool {
        self.leaving_until().is_some()
    }

    /// Whether the device is [plugged in](Self::plug), be there a guest or not.
    pub fn is_plugged(&self) -> bool {
        self.plugged
    }

    /// Takes the device out of the guest, and resets it. The connection stays, for [`plug`](Self::plug), if the guest's
    /// side acknowledges within a second.
    pub fn unplug(&mut self, device: &mut Device, now: Instant) {
        self.plugged = false;
        device.reset(now);
        let Some(guest) = &mut self.guest else { return };
        if self.active.is_none() {
            // Its card sessions have ended: nothing is left to go on with.
            return self.end();
        }
        match guest.attachment {
            Attachment::Attached => {
                self.forget_transfers();
                self.disconnect(Some(now + ACKNOWLEDGED_WITHIN));
            }
            Attachment::Rejected => guest.attachment = Attachment::None,
            Attachment::None | Attachment::Leaving(_) => {}
        }
    }

    /// Puts the device into the guest, at once or as soon as there is one that has seen it go.
    pub fn plug(&mut self) {
        let none = self.guest.as_ref().is_some_and(|guest| guest.attachment == Attachment::None);
        if !self.plugged && none {
            // Once more: a VM that was put back to a snapshot meanwhile has the device again, as far as it knows.
            self.disconnect(None);
        }
        self.plugged = true;
        self.settle_attachment();
    }

    /// Tells the guest's side that the device is gone, and waits for its word, if it gives one.
    fn disconnect(&mut self, until: Option<Instant>) {
        let Some(guest) = &mut self.guest else { return };
        let acknowledges = guest.caps.is_some_and(|caps| caps.has(Caps::DISCONNECT_ACK));
        guest.attachment = if acknowledges { Attachment::Leaving(until) } else { Attachment::None };
        self.send_as(0, &Reply::DeviceDisconnect);
    }

    /// Number and bytes of the answers kept for each endpoint.
    #[cfg(test)]
    pub(super) fn kept(&self) -> Vec<(usize, usize)> {
        self.guest.iter().flat_map(|guest| &guest.bulk_in).map(BulkIn::kept).collect()
    }

    // ---- connections ------------------------------------------------------------------------------------

    fn connected(&mut self, connection: ConnectionId) {
        if self.waiting.len() >= MOST_WAITING {
            // Who has said something waits for little longer; who has not can come again. Those that a session is
            // kept for are the last to go.
            let goes = self.waiting.iter().enumerate();
            let goes = goes.min_by_key(|(_, waiting)| (waiting.heir, waiting.said != Said::Nothing));
            if let Some(index) = goes.map(|(index, _)| index) {
                let waiting = self.waiting.remove(index);
                let silent = waiting.said == Said::Nothing;
                let reason = if silent { CloseReason::Silent } else { CloseReason::InUse };
                self.close(waiting.connection, reason);
            }
        }
        self.waiting.push(Waiting::new(connection));
    }

    fn received(&mut self, connection: ConnectionId, bytes: &[u8], device: &mut Device, now: Instant) {
        if self.active == Some(connection) {
            self.asked = false;
            if let Some(guest) = &mut self.guest {
                // Whoever writes has read, or will.
                guest.unread = Unread::default();
            }
            return self.packets(bytes, &mut Unread::default(), device, now);
        }
        let Some(index) = self.waiting.iter().position(|waiting| waiting.connection == connection) else {
            return;
        };
        let going_on = self.going_on();
        let goes_on_elsewhere = self.waiting.iter().any(|waiting| matches!(waiting.said, Said::Packet(_)));
        let kept_for_others = self.active.is_none();
        let Some(waiting) = self.waiting.get_mut(index) else { return };
        waiting.held.extend(bytes);
        let reason = match (waiting.said, First::judge(waiting.held.expose(), going_on)) {
            _ if waiting.held.len() > MOST_HELD => Some(CloseReason::TooMuch),
            (Said::Nothing, First::Unknown) | (Said::Hello(_) | Said::Packet(_), _) => None,
            (Said::Nothing, First::Hello) => {
                waiting.said = Said::Hello(now + GONE_WAIT);
                waiting.heir = false;
                None
            }
            (Said::Nothing, First::Packet) if kept_for_others && !waiting.heir => Some(CloseReason::NotHello),
            (Said::Nothing, First::Packet) if goes_on_elsewhere => Some(CloseReason::StillRuns),
            (Said::Nothing, First::Packet) => {
                waiting.said = Said::Packet(now + STOPPED_FOR);
                None
            }
            (Said::Nothing, First::Other) => Some(CloseReason::NotHello),
        };
        if let Some(reason) = reason {
            self.waiting.remove(index);
            self.close(connection, reason);
        }
    }

    fn lost(&mut self, connection: ConnectionId, device: &mut Device, now: Instant) {
        self.waiting.retain(|waiting| waiting.connection != connection);
        if self.active != Some(connection) {
            return;
        }
        self.active = None;
        for waiting in &mut self.waiting {
            waiting.heir = self.migrate && !matches!(waiting.said, Said::Hello(_));
        }
        if self.has_heir() {
            self.notice(Notice::Kept);
        } else {
            self.notice(Notice::Lost);
            self.end();
            device.reset(now);
        }
    }

    /// Its VM runs: nobody goes on with its session.
    fn reads(&mut self, connection: ConnectionId) {
        if self.active != Some(connection) {
            return;
        }
        self.filled = false;
        let (refused, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(|waiting| matches!(waiting.said, Said::Packet(_)));
        self.waiting = waiting;
        for waiting in refused {
            self.close(waiting.connection, CloseReason::StillRuns);
        }
    }

    /// Whether there is a session to go on with, and then whether it broke off within a packet.
    fn going_on(&self) -> Option<bool> {
        let guest = self.guest.as_ref().filter(|guest| self.migrate && guest.caps.is_some());
        guest.map(|guest| guest.decoder.in_packet())
    }

    fn has_heir(&self) -> bool {
        self.guest.is_some() && self.waiting.iter().any(|waiting| waiting.heir)
    }

    /// Lets in who may come in now, and ends a session that nobody is left for.
    fn admit(&mut self, device: &mut Device, now: Instant) {
        if let Some(active) = self.active {
            if !self.filled && self.waiting.iter().any(|waiting| matches!(waiting.said, Said::Packet(_))) {
                self.filled = true;
                self.output.extend(self.nothing().map(|packet| Output::Fill(active, packet)));
            }
            if !self.asked && self.waiting.iter().any(|waiting| matches!(waiting.said, Said::Hello(_))) {
                self.asked = true;
                if let Some(packet) = self.nothing() {
                    self.send_bytes(None, packet, false);
                }
            }
            return;
        }
        if let Some(index) = self.waiting.iter().position(|waiting| matches!(waiting.said, Said::Packet(_))) {
            return self.go_on(index, device, now);
        }
        if self.guest.is_some() && !self.has_heir() {
            self.notice(Notice::Lost);
            self.end();
            device.reset(now);
        }
        let first = self.waiting.iter().position(|waiting| matches!(waiting.said, Said::Hello(_)));
        if let (None, Some(index)) = (&self.guest, first) {
            let Waiting { connection, held, .. } = self.waiting.remove(index);
            device.reset(now);
            self.use_connection(connection);
            self.guest = Some(Guest::new(device.topology()));
            self.packets(held.expose(), &mut Unread::default(), device, now);
        }
    }

    /// The session goes on over another connection.
    fn go_on(&mut self, index: usize, device: &mut Device, now: Instant) {
        let Waiting { connection, held, .. } = self.waiting.remove(index);
        // Judged again: meanwhile more may have come from the one before.
        if First::judge(held.expose(), self.going_on()) != First::Packet {
            return self.close(connection, CloseReason::NotHello);
        }
        let mut unread =
            self.guest.as_mut().map(|guest| std::mem::take(&mut guest.unread)).unwrap_or_default();
        self.leave(CloseReason::Migrated);
        self.waiting.iter_mut().for_each(|waiting| waiting.heir = false);
        self.use_connection(connection);
        self.notice(Notice::Continued);
        self.packets(held.expose(), &mut unread, device, now);
        // After its first packets: what they ask for anew must not be answered by what is repeated.
        for (request, packet, validity) in unread.valid() {
            self.send_bytes(request, packet, true);
            self.limit_unread(validity);
        }
        self.settle_attachment();
    }

    /// A packet that a VMM passes over.
    fn nothing(&self) -> Option<Secret> {
        let caps = self.guest.as_ref()?.caps?;
        let nothing = Reply::InterruptReceivingStatus { status: Status::SUCCESS, endpoint: NO_ENDPOINT };
        Some(encode(0, &nothing, caps))
    }

    fn use_connection(&mut self, connection: ConnectionId) {
        self.active = Some(connection);
        self.asked = false;
        self.filled = false;
    }

    /// Packets of the connection in use; `unread` is what will be repeated on it.
    fn packets(&mut self, mut bytes: &[u8], unread: &mut Unread, device: &mut Device, now: Instant) {
        while self.active.is_some() {
            let decoded = self.guest.as_mut().and_then(|guest| guest.decoder.decode(&mut bytes));
            let Some(decoded) = decoded else { break };
            match decoded {
                Ok(request) => {
                    if !matches!(request.body, RequestBody::Cancel) {
                        unread.drop_answers(request.id);
                        self.give_back(device);
                    }
                    self.request(request, device, now);
                    self.serve(device, now);
                }
                Err(error) if error.is_fatal() => {
                    return self.abandon(CloseReason::Decode(error), device, now);
                }
                Err(error) => self.notice(Notice::BadPacket(error)),
            }
            self.check_output(device, now);
        }
        self.give_back(device);
    }

    /// Closes the connection in use; the session goes on.
    fn leave(&mut self, reason: CloseReason) {
        if let Some(connection) = self.active.take() {
            self.close(connection, reason);
        }
    }

    /// Ends the session, and with it the connection in use: nothing can continue it.
    fn abandon(&mut self, reason: CloseReason, device: &mut Device, now: Instant) {
        self.leave(reason);
        self.end();
        device.reset(now);
    }

    /// Forgets the guest and all that it was owed.
    fn end(&mut self) {
        self.guest = None;
        self.waiting.iter_mut().for_each(|waiting| waiting.heir = false);
    }

    fn leaving_until(&self) -> Option<Instant> {
        match self.guest.as_ref()?.attachment {
            Attachment::Leaving(until) => until,
            Attachment::None | Attachment::Attached | Attachment::Rejected => None,
        }
    }

    fn close(&mut self, connection: ConnectionId, reason: CloseReason) {
        self.output.push_back(Output::Close(connection, reason));
    }

    fn check_output(&mut self, device: &mut Device, now: Instant) {
        if self.output_bytes > MOST_OUTPUT {
            self.abandon(CloseReason::NotRead, device, now);
        }
    }

    // ---- attaching --------------------------------------------------------------------------------------

    /// Makes the guest's side know that the device is plugged in, if it is, as soon as that is possible.
    fn settle_attachment(&mut self) {
        let Some(guest) = &mut self.guest else { return };
        if self.active.is_some()
            && guest.caps.is_some()
            && self.plugged
            && guest.attachment == Attachment::None
        {
            guest.attachment = Attachment::Attached;
            self.attachments += 1;
            let topology = guest.topology.clone();
            self.describe();
            self.send_as(
                0,
                &Reply::DeviceConnect(DeviceConnect {
                    speed: match topology.speed {
                        Speed::Full => 1,
                        Speed::High => 2,
                    },
                    class: topology.class,
                    vendor: topology.vendor_id,
                    product: topology.product_id,
                    version: topology.device_version,
                }),
            );
        }
    }

    /// Sends what the guest's side needs to know of endpoints and interfaces.
    fn describe(&mut self) {
        let Some(Guest { topology, .. }) = &self.guest else { return };
        let mut endpoints = EpInfo::new(topology.control_packet.into());
        for interface in &topology.interfaces {
            for endpoint in interface.endpoints {
                let place = EpPlace {
                    kind: match endpoint.kind {
                        EndpointKind::Bulk => 2,
                        EndpointKind::Interrupt => 3,
                    },
                    interval: endpoint.interval,
                    interface: interface.number,
                    max_packet_size: endpoint.max_packet,
                };
                endpoints.set(endpoint.address, place);
            }
        }
        let interfaces = topology.interfaces.iter().map(|interface| {
            let [class, subclass, protocol] = interface.class;
            [interface.number, class, subclass, protocol]
        });
        let interfaces = InterfaceInfo(interfaces.collect());
        self.send_as(0, &Reply::EpInfo(&endpoints));
        self.send_as(0, &Reply::InterfaceInfo(&interfaces));
    }

    /// All begins anew: what waits is answered as cancelled, no notifications flow.
    fn forget_transfers(&mut self) {
        self.cancel_waiting(None);
        for place in self.guest.iter_mut().flat_map(|guest| &mut guest.interrupts) {
            place.forget();
        }
    }

    /// Answers all that waits, of one interface or of all, as cancelled: the device has forgotten it.
    fn cancel_waiting(&mut self, interface: Option<u16>) {
        let Some(guest) = &mut self.guest else { return };
        let mut places = std::mem::take(&mut guest.bulk_in);
        let mut waiting = Vec::new();
        for place in &mut places {
            if interface.is_none_or(|number| guest.is_of_interface(place.address, number)) {
                place.forget_answers();
                waiting.extend(place.pending.drain(..).map(|pending| (place.address, pending)));
            }
        }
        guest.bulk_in = places;
        for (endpoint, pending) in waiting {
            self.answer_bulk_in(endpoint, pending, Status::CANCELLED, &[]);
        }
    }

    // ---- requests ---------------------------------------------------------------------------------------

    fn request(&mut self, Request { id, body }: Request, device: &mut Device, now: Instant) {
        let Some(guest) = &mut self.guest else { return };
        let attached = guest.attachment == Attachment::Attached;
        match body {
            RequestBody::Hello { .. } if guest.caps.is_some() => {
                self.abandon(CloseReason::SecondHello, device, now);
            }
            RequestBody::Hello { caps, version } => self.hello(caps, version),
            RequestBody::Filter => {}
            RequestBody::Other(kind) => self.notice(Notice::Unexpected(kind)),
            RequestBody::DisconnectAck if matches!(guest.attachment, Attachment::Leaving(_)) => {
                guest.attachment = Attachment::None;
                self.settle_attachment();
            }
            RequestBody::DisconnectAck => self.notice(Notice::Unexpected(PacketType::DEVICE_DISCONNECT_ACK)),
            RequestBody::FilterReject if attached => {
                guest.attachment = Attachment::Rejected;
                self.forget_transfers();
                device.reset(now);
                self.notice(Notice::Rejected);
            }
            RequestBody::FilterReject => {}
            RequestBody::Cancel => self.cancel(id),
            RequestBody::Reset => {
                if attached {
                    self.forget_transfers();
                    device.reset(now);
                }
            }
            RequestBody::SetConfiguration(value) => {
                let setup = setup(0x00, standard::SET_CONFIGURATION, value.into(), 0, 0);
                let status = self.change(attached, setup, device, now);
                let configuration = if attached { device.configuration() } else { 0 };
                self.send(id, &Reply::ConfigurationStatus { status, configuration });
            }
            RequestBody::GetConfiguration if attached => {
                let (status, configuration) = (Status::SUCCESS, device.configuration());
                self.send(id, &Reply::ConfigurationStatus { status, configuration });
            }
            RequestBody::GetConfiguration => {
                self.send(id, &Reply::ConfigurationStatus { status: Status::IO_ERROR, configuration: 0 });
            }
            RequestBody::SetAltSetting { interface, alt } => {
                let setup = setup(0x01, standard::SET_INTERFACE, alt.into(), interface.into(), 0);
                let status = self.change(attached, setup, device, now);
                self.send(id, &Reply::AltSettingStatus { status, interface, alt });
            }
            RequestBody::GetAltSetting { interface } => {
                let setup = setup(0x81, standard::GET_INTERFACE, 0, interface.into(), 1);
                let (status, alt) = match self.control(attached, setup, &[], device, now) {
                    Ok(answer) => (Status::SUCCESS, answer.first().copied().unwrap_or(0)),
                    Err(status) => (status, 0),
                };
                self.send(id, &Reply::AltSettingStatus { status, interface, alt });
            }
            RequestBody::StartInterruptReceiving { endpoint } => {
                let place = guest.interrupts.iter_mut().find(|place| place.address == endpoint);
                let status = match place {
                    Some(place) if attached => {
                        place.start();
                        Status::SUCCESS
                    }
                    Some(_) => Status::IO_ERROR,
                    None => self.bad_endpoint(PacketType::START_INTERRUPT_RECEIVING, endpoint),
                };
                self.send(id, &Reply::InterruptReceivingStatus { status, endpoint });
            }
            RequestBody::StopInterruptReceiving { endpoint } => {
                let place = guest.interrupts.iter_mut().find(|place| place.address == endpoint);
                let status = match place {
                    Some(place) => {
                        place.stop(device, now);
                        Status::SUCCESS
                    }
                    None => self.bad_endpoint(PacketType::STOP_INTERRUPT_RECEIVING, endpoint),
                };
                self.send(id, &Reply::InterruptReceivingStatus { status, endpoint });
            }
            RequestBody::Control(header, data) => {
                self.control_packet(id, attached, header, &data, device, now)
            }
            RequestBody::Bulk { endpoint, stream, transfer: Transfer::In(length) } => {
                self.bulk_in(attached, endpoint, Pending { id, stream, length });
            }
            RequestBody::Bulk { endpoint, stream, transfer } => {
                let (status, length) = self.bulk_out(attached, endpoint, &transfer, device, now);
                self.send(id, &Reply::BulkOut { endpoint, stream, status, length });
            }
            RequestBody::Interrupt { endpoint } => {
                let status = self.bad_endpoint(PacketType::INTERRUPT_PACKET, endpoint);
                self.send(id, &Reply::InterruptOut { endpoint, status });
            }
        }
    }

    fn hello(&mut self, theirs: Caps, version: String) {
        self.send_as(0, &Reply::Hello);
        let caps = Caps::OURS.and(theirs);
        if let Some(guest) = &mut self.guest {
            guest.decoder.agree(caps);
            guest.caps = Some(caps);
        }
        self.notice(Notice::Connected { version });
        if !caps.has(Caps::FOR_XHCI) {
            self.notice(Notice::OldPeer);
        }
        self.settle_attachment();
    }

    fn cancel(&mut self, id: u64) {
        let Some(guest) = &mut self.guest else { return };
        let waiting = guest.bulk_in.iter_mut().find_map(|place| Some((place.address, place.cancel(id)?)));
        match waiting {
            Some((endpoint, pending)) => self.answer_bulk_in(endpoint, pending, Status::CANCELLED, &[]),
            None => guest.bulk_in.iter_mut().for_each(|place| place.lose(id)),
        }
    }

    /// A change of configuration or of an alternate setting. Once it is done, and before it is answered, the
    /// guest's side is told all anew.
    fn change(&mut self, attached: bool, setup: Setup, device: &mut Device, now: Instant) -> Status {
        match self.control(attached, setup, &[], device, now) {
            Ok(_) => {
                self.describe();
                Status::SUCCESS
            }
            Err(status) => status,
        }
    }

    fn control_packet(
        &mut self,
        id: u64,
        attached: bool,
        header: Control,
        data: &Secret,
        device: &mut Device,
        now: Instant,
    ) {
        let Control { endpoint, request, request_type, value, index, length } = header;
        let setup = Setup { request_type, request, value, index, length };
        let outcome = if endpoint & 0x7F != 0 || is_in(endpoint) != is_in(request_type) {
            Err(self.bad_endpoint(PacketType::CONTROL_PACKET, endpoint))
        } else {
            self.control(attached, setup, data.expose(), device, now)
        };
        let (status, answer) = match outcome {
            Ok(answer) => (Status::SUCCESS, answer),
            Err(status) => (status, Vec::new()),
        };
        let (length, answer) = match (is_in(endpoint), status) {
            (true, _) => {
                let answer = answer.get(..length.into()).unwrap_or(&answer);
                (answer.len() as u16, answer)
            }
            (false, Status::SUCCESS) => (length, &[][..]),
            (false, _) => (0, &[][..]),
        };
        self.send(id, &Reply::Control { header: Control { length, ..header }, status, data: answer });
    }

    /// Gives a control request to the device, and follows what it changes there. SET_CONFIGURATION and
    /// SET_INTERFACE have packet types of their own, but mean the same if they come as any other request.
    fn control(
        &mut self,
        attached: bool,
        setup: Setup,
        data: &[u8],
        device: &mut Device,
        now: Instant,
    ) -> Result<Vec<u8>, Status> {
        if !attached {
            return Err(Status::IO_ERROR);
        }
        let outcome = device.control(setup, data, now);
        match (setup.request_type, setup.request, &outcome) {
            // Done or not, QEMU takes receiving for stopped.
            (0x00, standard::SET_CONFIGURATION, _) => self.forget_transfers(),
            (0x01, standard::SET_INTERFACE, ControlOutcome::Done(_)) => {
                self.cancel_waiting(Some(setup.index))
            }
            (0x02, standard::CLEAR_FEATURE, ControlOutcome::Done(_))
                if setup.value == standard::ENDPOINT_HALT =>
            {
                for place in self.guest.iter_mut().flat_map(|guest| &mut guest.bulk_in) {
                    if u16::from(place.address) == setup.index {
                        place.forget_answers();
                    }
                }
            }
            _ => {}
        }
        match outcome {
            ControlOutcome::Done(answer) => Ok(answer),
            ControlOutcome::Stall => Err(Status::STALL),
        }
    }

    fn bulk_in(&mut self, attached: bool, endpoint: u8, pending: Pending) {
        let Some(guest) = &mut self.guest else { return };
        guest.bulk_in.iter_mut().for_each(|place| place.is_over(pending.id));
        let refused = match guest.bulk_in.iter_mut().find(|place| place.address == endpoint) {
            _ if !attached => Status::IO_ERROR,
            Some(place) if place.pending.len() < MOST_PENDING => return place.pending.push_back(pending),
            Some(_) => {
                self.notice(Notice::TooManyPending { endpoint });
                Status::INVALID
            }
            None => self.bad_endpoint(PacketType::BULK_PACKET, endpoint),
        };
        self.answer_bulk_in(endpoint, pending, refused, &[]);
    }

    fn bulk_out(
        &mut self,
        attached: bool,
        endpoint: u8,
        transfer: &Transfer,
        device: &mut Device,
        now: Instant,
    ) -> (Status, u32) {
        if !attached {
            return (Status::IO_ERROR, 0);
        }
        if !self.guest.as_ref().is_some_and(|guest| guest.is_bulk_out(endpoint)) {
            return (self.bad_endpoint(PacketType::BULK_PACKET, endpoint), 0);
        }
        let Transfer::Out(data) = transfer else {
            self.notice(Notice::TooLong { endpoint });
            // As with everything else that is no message: the endpoint is halted.
            device.control(
                setup(0x02, standard::SET_FEATURE, standard::ENDPOINT_HALT, endpoint.into(), 0),
                &[],
                now,
            );
            return (Status::STALL, 0);
        };
        match device.bulk_out(endpoint, data.expose(), now) {
            TransferOutcome::Accepted => (Status::SUCCESS, data.len() as u32),
            TransferOutcome::Stall => (Status::STALL, 0),
        }
    }

    fn bad_endpoint(&mut self, kind: PacketType, endpoint: u8) -> Status {
        self.notice(Notice::BadEndpoint { kind, endpoint });
        Status::INVALID
    }

    // ---- what the device has for the guest ---------------------------------------------------------------

    /// Gives answers that were lost back to the device.
    fn give_back(&mut self, device: &mut Device) {
        for place in self.guest.iter_mut().flat_map(|guest| &mut guest.bulk_in) {
            place.give_back(device);
        }
    }

    /// Answers who waits, with what there is.
    fn serve(&mut self, device: &mut Device, now: Instant) {
        let Some(guest) = &self.guest else { return };
        if self.active.is_none() || guest.attachment != Attachment::Attached {
            return;
        }
        for index in 0..guest.bulk_in.len() {
            while self.serve_bulk(index, device, now).is_some() {}
        }
        for index in 0..self.guest.as_ref().map_or(0, |guest| guest.interrupts.len()) {
            for _ in 0..MOST_NOTIFICATIONS {
                if self.notify(index, device, now).is_none() {
                    break;
                }
            }
        }
    }

    /// Answers the transfer that has waited longest; `None` if there is none, or nothing to answer it with.
    fn serve_bulk(&mut self, index: usize, device: &mut Device, now: Instant) -> Option<()> {
        let place = self.guest.as_mut()?.bulk_in.get_mut(index)?;
        let pending = *place.pending.front()?;
        let (endpoint, outcome) = (place.address, device.bulk_in(place.address, pending.length as usize));
        if !matches!(outcome, InOutcome::Nothing) {
            place.pending.pop_front();
        }
        match outcome {
            InOutcome::Data(data) => {
                self.answer_bulk_in(endpoint, pending, Status::SUCCESS, data.expose());
                self.limit_unread(device.bulk_in_validity(endpoint));
                // One that wants nothing takes nothing from the device.
                if pending.length > 0 {
                    self.guest.as_mut()?.bulk_in.get_mut(index)?.answered(pending.id, data, now);
                }
            }
            InOutcome::Nothing => return None,
            InOutcome::Stall => self.answer_bulk_in(endpoint, pending, Status::STALL, &[]),
        }
        Some(())
    }

    /// Sends a notification; `None` if there is none, or nobody to receive it.
    fn notify(&mut self, index: usize, device: &mut Device, now: Instant) -> Option<()> {
        let place = self.guest.as_mut()?.interrupts.get_mut(index)?;
        if !place.receiving {
            return None;
        }
        let endpoint = place.address;
        match device.interrupt_in(endpoint) {
            InOutcome::Data(data) => {
                let id = place.sending(now);
                let status = Status::SUCCESS;
                self.send_as(id, &Reply::InterruptIn { endpoint, status, data: data.expose() });
                Some(())
            }
            InOutcome::Nothing => None,
            InOutcome::Stall => {
                // The guest's side knows by this that receiving has stopped, and starts it again.
                place.receiving = false;
                self.send_as(0, &Reply::InterruptReceivingStatus { status: Status::STALL, endpoint });
                None
            }
        }
    }

    // ---- sending ----------------------------------------------------------------------------------------

    fn answer_bulk_in(&mut self, endpoint: u8, pending: Pending, status: Status, data: &[u8]) {
        let Pending { id, stream, .. } = pending;
        self.send(id, &Reply::BulkIn { endpoint, stream, status, data });
    }

    /// Answers the request of that id.
    fn send(&mut self, id: u64, reply: &Reply<'_>) {
        self.send_packet(Some(id), id, reply);
    }

    /// Sends what no request asked for.
    fn send_as(&mut self, id: u64, reply: &Reply<'_>) {
        self.send_packet(None, id, reply);
    }

    fn send_packet(&mut self, request: Option<u64>, id: u64, reply: &Reply<'_>) {
        let caps = self.guest.as_ref().and_then(|guest| guest.caps).unwrap_or_default();
        let is_hello = matches!(reply, Reply::Hello);
        self.send_bytes(request, encode(id, reply, caps), !is_hello);
    }

    fn send_bytes(&mut self, request: Option<u64>, packet: Secret, repeatable: bool) {
        let (Some(connection), Some(guest)) = (self.active, &mut self.guest) else { return };
        if repeatable && self.migrate {
            guest.unread.push(request, &packet);
        }
        self.output_bytes += packet.len();
        self.output.push_back(Output::Send(connection, packet));
    }

    /// What was sent last may be repeated only as long as that.
    fn limit_unread(&mut self, validity: Validity) {
        if let Some(guest) = &mut self.guest {
            guest.unread.limit(validity);
        }
    }

    /// What the peer can do over and over is told each time: whoever logs it has a budget.
    fn notice(&mut self, notice: Notice) {
        self.output.push_back(Output::Notice(notice));
    }
}

fn setup(request_type: u8, request: u8, value: u16, index: u16, length: u16) -> Setup {
    Setup { request_type, request, value, index, length }
}

/// Requests that the session knows, too (USB 2.0 §9.4).
mod standard {
    pub(super) const CLEAR_FEATURE: u8 = 1;
    pub(super) const SET_FEATURE: u8 = 3;
    pub(super) const SET_CONFIGURATION: u8 = 9;
    pub(super) const GET_INTERFACE: u8 = 10;
    pub(super) const SET_INTERFACE: u8 = 11;
    /// A feature of endpoints.
    pub(super) const ENDPOINT_HALT: u16 = 0;
}
