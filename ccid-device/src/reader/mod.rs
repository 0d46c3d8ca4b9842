//! Drives a device with cards: what its actions ask for is done, and a carrier takes it to a guest.
//!
//! A [`Reader`] owns a [`Device`], a task for each slot and the connections of its carrier. It is one task; run as
//! many as there are readers.

mod connection;
mod slot;
mod usbip;

use std::mem::{Discriminant, discriminant};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;
use vscard_protocol::chardev::{Channel, ChannelError, Stream};
use vscard_protocol::{CardSource, LogBudget};

use crate::usbip::management::GONE_WAIT;
use crate::usbip::urbs::{self, Urbs};
use crate::usbredir::{self, ConnectionId, Session};
use crate::{Action, ConfigError, Device, DeviceConfig, SlotId};

use connection::{Connections, Event as Happened};
use slot::{Job, SlotEvent, SlotTask};
pub use usbip::Exports;
use usbip::Order;

/// Events of one reader that may wait; whoever has more waits, too.
const MOST_EVENTS: usize = 256;

/// Where a reader appears.
#[expect(clippy::large_enum_variant, reason = "there is one for each reader")]
pub enum Carrier {
    /// QEMU's `usb-redir`, at the other end of this channel.
    Usbredir {
        /// Where it connects, or is connected to.
        channel: Channel,
        /// A guest that migrates takes its card sessions along: see [`Session::migrating`]. Only over a UNIX socket
        /// that is listened on is there another end to migrate to, and a peer that is known.
        migrate: bool,
    },
    /// USB/IP clients of this server.
    Usbip(Exports),
}

/// What a reader tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReaderEvent {
    /// A card is in.
    Inserted(SlotId),
    /// The card is out.
    Removed(SlotId),
    /// A guest has the reader.
    Attached,
    /// No guest has it any more.
    Detached,
}

impl std::fmt::Display for ReaderEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inserted(slot) => write!(f, "card inserted in slot {}", slot.0),
            Self::Removed(slot) => write!(f, "card removed from slot {}", slot.0),
            Self::Attached => f.write_str("a guest has it"),
            Self::Detached => f.write_str("no guest has it any more"),
        }
    }
}

/// What can be asked of a running reader.
enum Request {
    Query(oneshot::Sender<Status>),
    Eject(SlotId, bool, oneshot::Sender<bool>),
    Detach(oneshot::Sender<bool>),
    /// Until it is plugged in again; tells when no guest has it any more.
    Unplug(oneshot::Sender<bool>),
    Plug(oneshot::Sender<bool>),
    End(oneshot::Sender<()>),
}

/// A look at a reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// It is [plugged in](Handle::plug), so that a guest can have it.
    pub plugged: bool,
    /// A guest has it.
    pub attached: bool,
    /// For each slot, whether a card is in.
    pub cards: Vec<bool>,
}

/// Speaks to a running [`Reader`].
#[derive(Clone)]
pub struct Handle(mpsc::Sender<Event>);

impl Handle {
    /// How things are; `None` once the reader has ended.
    pub async fn status(&self) -> Option<Status> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Event::Request(Request::Query(reply))).await.ok()?;
        answer.await.ok()
    }

    /// Puts the card of a slot in, or takes it out, as far as the guest is concerned; whether a card is in then.
    /// `None` if there is no such slot, or it has no source of cards. A card that was just taken out is in after a
    /// second.
    pub async fn set_inserted(&self, slot: SlotId, inserted: bool) -> Option<bool> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Eject(slot, !inserted, reply);
        self.0.send(Event::Request(request)).await.ok()?;
        answer.await.ok()
    }

    /// Takes the reader from the guest that has it, whose card sessions end; whether there was one. A USB/IP client's
    /// connection is closed, and the next client can import the reader; over usbredir it is plugged in again at once,
    /// and a VMM that does not acknowledge the unplugging within a second is left.
    pub async fn detach(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.0.send(Event::Request(Request::Detach(reply))).await.is_ok() && answer.await.unwrap_or(false)
    }

    /// Takes the reader from the guest that has it, as [`detach`](Self::detach) does, and keeps it from all until it is
    /// [plugged in](Self::plug); returns when no guest has it any more. `None` once the reader has ended.
    pub async fn unplug(&self) -> Option<()> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Event::Request(Request::Unplug(reply))).await.ok()?;
        answer.await.ok().map(drop)
    }

    /// Plugs the reader in, as it is from the start. `None` once it has ended.
    pub async fn plug(&self) -> Option<()> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Event::Request(Request::Plug(reply))).await.ok()?;
        answer.await.ok().map(drop)
    }

    /// Takes the reader out of the guest and ends it; returns when what tells the guest's side is written and the
    /// connection closed, or nobody reads it.
    pub async fn end(&self) {
        let (reply, answer) = oneshot::channel();
        if self.0.send(Event::Request(Request::End(reply))).await.is_ok() {
            let _ = answer.await;
        }
    }
}

enum Event {
    Slot(SlotId, SlotEvent),
    /// There is a stream; the sender is told, by being dropped, when it is gone.
    Connected(Stream, oneshot::Sender<()>),
    Request(Request),
}

/// What ends a reader's wait.
enum Next {
    Event(Event),
    Happened(Happened),
    Due,
}

/// A device with its cards and its carrier.
pub struct Reader {
    device: Device,
    slots: Vec<Option<mpsc::UnboundedSender<Job>>>,
    present: Vec<bool>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    news: mpsc::UnboundedSender<ReaderEvent>,
    plugged: bool,
    attached: bool,
}

impl Reader {
    /// A reader with a card source for each slot that has one. Must be called within a tokio runtime.
    ///
    /// `news` gets what happens.
    ///
    /// # Errors
    /// [`ConfigError`] for a device that cannot be, or more sources than slots.
    pub fn new(
        config: DeviceConfig,
        sources: Vec<Option<Arc<dyn CardSource>>>,
        news: mpsc::UnboundedSender<ReaderEvent>,
    ) -> Result<Self, ConfigError> {
        let device = Device::new(config)?;
        let events = mpsc::channel(MOST_EVENTS);
        let mut sources = sources.into_iter();
        let slots: Vec<_> = device
            .slots()
            .map(|slot| {
                let source = sources.next().flatten()?;
                let (jobs, queue) = mpsc::unbounded_channel();
                tokio::spawn(SlotTask::new(slot, source, events.0.clone()).run(queue));
                Some(jobs)
            })
            .collect();
        let present = vec![false; slots.len()];
        Ok(Self { device, slots, present, events, news, plugged: true, attached: false })
    }

    /// What speaks to it while it runs.
    pub fn handle(&self) -> Handle {
        Handle(self.events.0.clone())
    }

    /// Runs until it is [ended](Handle::end).
    ///
    /// # Errors
    /// [`ChannelError`] when the carrier's endpoint is of no use.
    pub async fn run(mut self, carrier: Carrier) -> Result<(), ChannelError> {
        match carrier {
            Carrier::Usbredir { channel, migrate } => self.run_usbredir(channel, migrate).await,
            Carrier::Usbip(exports) => {
                self.run_usbip(exports).await;
                Ok(())
            }
        }
    }

    async fn run_usbredir(&mut self, channel: Channel, migrate: bool) -> Result<(), ChannelError> {
        let (failed, mut failure) = oneshot::channel();
        let events = self.events.0.clone();
        let opener = tokio::spawn(async move {
            if let Err(error) = connection::open_all(channel, events).await {
                let _ = failed.send(error);
            }
        });
        let mut link = Link::new(if migrate { Session::migrating() } else { Session::new() });
        let mut alarm = Alarm::new();
        let mut attachments = 0;
        loop {
            self.carry_usbredir(&mut link);
            self.plugged = link.session.is_plugged();
            // One may have gone and another come at once.
            if link.session.attachments() != std::mem::replace(&mut attachments, link.session.attachments()) {
                self.tell_attached(false);
            }
            self.tell_attached(link.session.is_attached());
            if !link.session.is_leaving() {
                link.unplugging.drain(..).for_each(|(reply, answer)| tell(reply, answer));
            }
            let due = [self.device.next_deadline(), link.session.next_deadline()];
            let next = tokio::select! {
                happened = link.connections.event() => Next::Happened(happened),
                Some(event) = self.events.1.recv() => Next::Event(event),
                Ok(error) = &mut failure => return Err(error),
                () = alarm.at(due.into_iter().flatten().min()) => Next::Due,
            };
            let now = Instant::now();
            match next {
                Next::Happened(happened) => self.happened(&mut link, happened, now),
                Next::Event(Event::Slot(slot, event)) => self.slot_event(slot, event, now),
                Next::Event(Event::Connected(stream, done)) => {
                    let id = ConnectionId(link.connections.add(stream, done));
                    link.session.handle(usbredir::Input::Connected(id), &mut self.device, now);
                }
                Next::Event(Event::Request(Request::End(reply))) => {
                    link.session.unplug(&mut self.device, now);
                    self.carry_usbredir(&mut link);
                    self.tell_attached(link.session.is_attached());
                    link.connections.flush().await;
                    opener.abort();
                    tell(reply, ());
                    return Ok(());
                }
                Next::Event(Event::Request(Request::Detach(reply))) => {
                    let attached = link.session.is_attached();
                    if attached {
                        link.session.unplug(&mut self.device, now);
                        self.tell_attached(false);
                        link.session.plug();
                    }
                    link.unplugging.push((reply, attached));
                }
                Next::Event(Event::Request(Request::Unplug(reply))) => {
                    let attached = link.session.is_attached();
                    link.session.unplug(&mut self.device, now);
                    link.unplugging.push((reply, attached));
                }
                Next::Event(Event::Request(Request::Plug(reply))) => {
                    link.session.plug();
                    tell(reply, true);
                }
                Next::Event(Event::Request(request)) => self.request(request),
                Next::Due => {
                    // What has been read counts, though the news of it comes late.
                    while let Some(id) = link.connections.read_again() {
                        let read = usbredir::Input::Reads(ConnectionId(id));
                        link.session.handle(read, &mut self.device, now);
                    }
                    self.device.handle_deadline(now);
                    link.session.handle_deadline(&mut self.device, now);
                }
            }
        }
    }

    fn happened(&mut self, link: &mut Link, happened: Happened, now: Instant) {
        let input = match happened {
            Happened::Received(id, count) => {
                usbredir::Input::Received(ConnectionId(id), link.connections.received(count))
            }
            Happened::Lost(id) => usbredir::Input::Lost(ConnectionId(id)),
            Happened::Reads(id) => usbredir::Input::Reads(ConnectionId(id)),
        };
        link.session.handle(input, &mut self.device, now);
    }

    fn carry_usbredir(&mut self, link: &mut Link) {
        loop {
            let Link { session, connections, .. } = link;
            session.handle(usbredir::Input::DeviceReady, &mut self.device, Instant::now());
            let mut moved = false;
            while let Some(output) = session.poll_output() {
                moved = true;
                let now = Instant::now();
                match output {
                    usbredir::Output::Send(ConnectionId(id), bytes) => connections.send(id, bytes),
                    usbredir::Output::Fill(ConnectionId(id), bytes) => {
                        if !connections.fill(id, &bytes) {
                            session.handle(usbredir::Input::Reads(ConnectionId(id)), &mut self.device, now);
                        }
                    }
                    usbredir::Output::Close(ConnectionId(id), reason) => {
                        link.lines.tell(Told::Closed(discriminant(&reason)), |end| {
                            tracing::info!("connection closed: {reason}{end}");
                        });
                        connections.close(id);
                        session.handle(usbredir::Input::Lost(ConnectionId(id)), &mut self.device, now);
                    }
                    usbredir::Output::Notice(notice) => {
                        link.lines.tell(Told::Notice(discriminant(&notice)), |end| {
                            tracing::info!("{notice}{end}");
                        });
                    }
                }
            }
            while let Some(id) = connections.overrun() {
                link.lines.tell(Told::Unread, |end| {
                    tracing::warn!("connection closed: the VMM does not read{end}");
                });
                connections.close(id);
                let now = Instant::now();
                // What it has not read is gone, so nothing can go on.
                session.unplug(&mut self.device, now);
                session.handle(usbredir::Input::Lost(ConnectionId(id)), &mut self.device, now);
                session.plug();
            }
            if !moved {
                break;
            }
        }
        // The guest has its acknowledgement on the way before a card's thread is woken.
        self.act();
    }

    async fn run_usbip(&mut self, mut exports: Exports) {
        let mut connections = Connections::new();
        let mut alarm = Alarm::new();
        let mut client: Option<(u64, Urbs)> = None;
        let mut question = Question::default();
        let lines = LogBudget::new();
        loop {
            match &mut client {
                Some((_, urbs)) if question.is_put(Instant::now()) => {
                    tracing::debug!("wanted by another USB/IP client");
                    urbs.handle(urbs::Input::AskPeer, &mut self.device, Instant::now());
                }
                Some(_) => {}
                None => question = Question::default(),
            }
            self.carry_usbip(&mut client, &mut connections, &exports, &lines);
            self.tell_attached(client.is_some());
            let due = [self.device.next_deadline(), question.due()];
            let next = tokio::select! {
                happened = connections.event() => Next::Happened(happened),
                Some(event) = self.events.1.recv() => Next::Event(event),
                Some(order) = exports.order() => {
                    match order {
                        // Chosen just before it was unplugged.
                        Order::Imported(..) if !self.plugged => exports.set_free(),
                        Order::Imported(stream, rest) => {
                            let (done, _) = oneshot::channel();
                            let id = connections.add(stream, done);
                            lines.tell(Line::Imported, |end| tracing::info!("imported by a USB/IP client{end}"));
                            let mut session = exports.urbs();
                            let input = urbs::Input::Received(rest.expose());
                            session.handle(input, &mut self.device, Instant::now());
                            client = Some((id, session));
                        }
                        Order::Ask => question.wanted = true,
                    }
                    continue;
                }
                () = alarm.at(due.into_iter().flatten().min()) => Next::Due,
            };
            let now = Instant::now();
            match next {
                Next::Happened(Happened::Received(id, count)) => {
                    if let Some((_, urbs)) = client.as_mut().filter(|(of, _)| *of == id) {
                        let input = urbs::Input::Received(connections.received(count));
                        urbs.handle(input, &mut self.device, now);
                    }
                }
                Next::Happened(Happened::Reads(_)) => {}
                Next::Happened(Happened::Lost(id)) => {
                    if client.as_ref().is_some_and(|(of, _)| *of == id) {
                        lines.tell(Line::Gone, |end| tracing::info!("USB/IP client gone{end}"));
                        self.end_import(&mut client, &mut connections, now);
                        exports.set_free();
                    }
                }
                Next::Event(Event::Slot(slot, event)) => self.slot_event(slot, event, now),
                Next::Event(Event::Connected(..)) => {}
                Next::Event(Event::Request(Request::End(reply))) => {
                    self.end_import(&mut client, &mut connections, now);
                    connections.flush().await;
                    tell(reply, ());
                    return;
                }
                Next::Event(Event::Request(Request::Detach(reply))) => {
                    let detached = self.end_import(&mut client, &mut connections, now);
                    if detached {
                        exports.set_free();
                    }
                    tell(reply, detached);
                }
                Next::Event(Event::Request(Request::Unplug(reply))) => {
                    // First, so that nobody imports it in between.
                    self.plugged = false;
                    exports.set_plugged(false);
                    let detached = self.end_import(&mut client, &mut connections, now);
                    if detached {
                        exports.set_free();
                    }
                    tell(reply, detached);
                }
                Next::Event(Event::Request(Request::Plug(reply))) => {
                    self.plugged = true;
                    exports.set_plugged(true);
                    tell(reply, true);
                }
                Next::Event(Event::Request(request)) => self.request(request),
                Next::Due => self.device.handle_deadline(now),
            }
        }
    }

    /// Takes the device from the client that has it, if one does: the end of its connection is the unplugging.
    fn end_import(
        &mut self,
        client: &mut Option<(u64, Urbs)>,
        connections: &mut Connections,
        now: Instant,
    ) -> bool {
        let Some((id, mut urbs)) = client.take() else { return false };
        urbs.handle(urbs::Input::Gone, &mut self.device, now);
        self.act();
        connections.close(id);
        self.tell_attached(false);
        true
    }

    fn carry_usbip(
        &mut self,
        client: &mut Option<(u64, Urbs)>,
        connections: &mut Connections,
        exports: &Exports,
        lines: &LogBudget<Line>,
    ) {
        while let Some((id, urbs)) = client {
            let id = *id;
            urbs.handle(urbs::Input::DeviceReady, &mut self.device, Instant::now());
            let (mut moved, mut closed) = (false, false);
            while let Some(output) = urbs.poll_output() {
                moved = true;
                match output {
                    urbs::Output::Send(bytes) => connections.send(id, bytes),
                    urbs::Output::Notice(notice) => {
                        lines
                            .tell(Line::Notice(discriminant(&notice)), |end| tracing::info!("{notice}{end}"));
                    }
                    urbs::Output::Close(reason) => {
                        lines.tell(Line::Closed(discriminant(&reason)), |end| {
                            tracing::info!("connection closed: {reason}{end}");
                        });
                        closed = true;
                    }
                }
            }
            if !closed && connections.overrun().is_some() {
                lines.tell(Line::Unread, |end| {
                    tracing::warn!("connection closed: the USB/IP client does not read{end}");
                });
                urbs.handle(urbs::Input::Gone, &mut self.device, Instant::now());
                closed = true;
            }
            if closed {
                connections.close(id);
                *client = None;
                exports.set_free();
            }
            if !moved {
                break;
            }
        }
        // As for usbredir: first the acknowledgement.
        self.act();
    }

    /// Hands the device's wishes to the slots' tasks.
    fn act(&mut self) {
        while let Some(action) = self.device.poll_action() {
            let slot = usize::from(action.slot().0);
            let job = match action {
                Action::PowerOn { token, .. } => Job::PowerOn(token),
                Action::PowerOff { .. } => Job::PowerOff,
                Action::Transmit { token, command, .. } => Job::Transmit(token, command),
            };
            if let Some(Some(jobs)) = self.slots.get(slot) {
                let _ = jobs.send(job);
            }
        }
    }

    fn slot_event(&mut self, slot: SlotId, event: SlotEvent, now: Instant) {
        match event {
            SlotEvent::Inserted => {
                self.device.insert(slot, now);
                self.set_present(slot, true);
            }
            SlotEvent::Removed => {
                self.device.remove(slot, now);
                self.set_present(slot, false);
            }
            SlotEvent::Completed(token, outcome) => self.device.complete(token, outcome, now),
        }
    }

    fn set_present(&mut self, slot: SlotId, present: bool) {
        if let Some(known) = self.present.get_mut(usize::from(slot.0)) {
            *known = present;
        }
        let event = if present { ReaderEvent::Inserted(slot) } else { ReaderEvent::Removed(slot) };
        let _ = self.news.send(event);
    }

    fn tell_attached(&mut self, attached: bool) {
        if attached != self.attached {
            self.attached = attached;
            let event = if attached { ReaderEvent::Attached } else { ReaderEvent::Detached };
            let _ = self.news.send(event);
        }
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Query(reply) => {
                let (plugged, attached, cards) = (self.plugged, self.attached, self.present.clone());
                let _ = reply.send(Status { plugged, attached, cards });
            }
            Request::Eject(slot, ejected, reply) => {
                // The slot's task answers; without one the reply is dropped.
                if let Some(Some(jobs)) = self.slots.get(usize::from(slot.0)) {
                    let _ = jobs.send(Job::Eject(ejected, reply));
                }
            }
            // A carrier's.
            Request::Detach(reply) | Request::Unplug(reply) | Request::Plug(reply) => tell(reply, false),
            Request::End(reply) => tell(reply, ()),
        }
    }
}

/// Whoever asked may have given up.
fn tell<T>(asked: oneshot::Sender<T>, answer: T) {
    let _ = asked.send(answer);
}

/// What a reader is to usbredir.
struct Link {
    session: Session,
    connections: Connections,
    /// Who waits until the guest's side has let go of the device, and what is told then.
    unplugging: Vec<(oneshot::Sender<bool>, bool)>,
    lines: LogBudget<Told>,
}

impl Link {
    fn new(session: Session) -> Self {
        Self { session, connections: Connections::new(), unplugging: Vec::new(), lines: LogBudget::new() }
    }
}

/// What is told in the log of VMMs, who have it repeated as fast as they like.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Closed(Discriminant<usbredir::CloseReason>),
    Notice(Discriminant<usbredir::Notice>),
    Unread,
}

/// What is told in the log of USB/IP clients, who have it repeated as fast as they like.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Imported,
    Gone,
    Closed(Discriminant<urbs::CloseReason>),
    Notice(Discriminant<urbs::Notice>),
    Unread,
}

/// Whether the USB/IP client that has the device is to be asked if it is there. Each time leaves a line in its kernel's
/// log, and whoever can connect can have it asked: not more often than a client that is gone needs to show that.
#[derive(Default)]
struct Question {
    wanted: bool,
    put: Option<Instant>,
}

impl Question {
    /// When it is to be put, if it is.
    fn due(&self) -> Option<Instant> {
        self.put.filter(|_| self.wanted).map(|put| put + GONE_WAIT)
    }

    /// Whether it is to be put now; then it is.
    fn is_put(&mut self, now: Instant) -> bool {
        let is_put = self.wanted && self.due().is_none_or(|due| due <= now);
        if is_put {
            *self = Self { wanted: false, put: Some(now) };
        }
        is_put
    }
}

/// A timer for deadlines that move with every command and hardly ever come: it is left as it is as long as it does
/// not go off too late, because to set it takes a system call and a turn of the event loop.
struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Alarm {
    fn new() -> Self {
        Self { sleep: None }
    }

    /// Waits until then. Safe to cancel.
    async fn at(&mut self, due: Option<Instant>) {
        let Some(due) = due.map(tokio::time::Instant::from) else { return std::future::pending().await };
        loop {
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
            if due < sleep.deadline() || sleep.is_elapsed() {
                sleep.as_mut().reset(due);
            }
            sleep.as_mut().await;
            if due <= tokio::time::Instant::now() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use vscard_protocol::Secret;
    use vscard_protocol::chardev::Plaintext;

    use super::*;

    #[tokio::test]
    async fn a_vmm_that_does_not_read_loses_its_session() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("reader");
        let endpoint = format!("unix-listen:{}", path.display()).parse().expect("an endpoint");
        let mut channel = Channel::open(endpoint, Plaintext::LoopbackOnly).await.expect("a channel");
        let (news, mut told) = mpsc::unbounded_channel();
        let mut reader = Reader::new(DeviceConfig::new("test"), Vec::new(), news).expect("a reader");
        let mut link = Link::new(Session::new());
        for _ in 0..2 {
            let (vmm, stream) = tokio::join!(UnixStream::connect(&path), channel.stream());
            let id = link.connections.add(stream.expect("a stream"), oneshot::channel().0);
            for input in [
                usbredir::Input::Connected(ConnectionId(id)),
                usbredir::Input::Received(ConnectionId(id), &hello()),
            ] {
                link.session.handle(input, &mut reader.device, Instant::now());
            }
            reader.carry_usbredir(&mut link);
            reader.tell_attached(link.session.is_attached());
            assert_eq!(told.recv().await, Some(ReaderEvent::Attached));
            link.connections.send(id, Secret::from(&vec![0; 16 << 20][..]));
            reader.carry_usbredir(&mut link);
            reader.tell_attached(link.session.is_attached());
            assert_eq!(told.try_recv(), Ok(ReaderEvent::Detached));
            let mut unread = Vec::new();
            assert!(vmm.expect("a connection").read_to_end(&mut unread).await.is_ok());
        }
    }

    /// Hello, without any capability.
    fn hello() -> Vec<u8> {
        [0, 68, 0].into_iter().flat_map(u32::to_le_bytes).chain([0; 68]).collect()
    }

    /// A reader that guests may take along, and where it listens.
    async fn migrating(directory: &tempfile::TempDir) -> PathBuf {
        let path = directory.path().join("reader");
        let endpoint = format!("unix-listen:{}", path.display()).parse().expect("an endpoint");
        let channel = Channel::open(endpoint, Plaintext::LoopbackOnly).await.expect("a channel");
        let (news, _) = mpsc::unbounded_channel();
        let reader = Reader::new(DeviceConfig::new("test"), Vec::new(), news).expect("a reader");
        tokio::spawn(reader.run(Carrier::Usbredir { channel, migrate: true }));
        path
    }

    /// Sends get_configuration, and reads its answer, if there is one.
    async fn goes_on(path: &Path) -> Option<[u8; 14]> {
        let mut vmm = UnixStream::connect(path).await.expect("a connection");
        let request: Vec<u8> = [7_u32, 0, 5].into_iter().flat_map(u32::to_le_bytes).collect();
        vmm.write_all(&request).await.expect("a reader");
        let mut answer = [0; 14];
        vmm.read_exact(&mut answer).await.ok().map(|_| answer)
    }

    #[tokio::test]
    async fn a_guest_goes_on_elsewhere_only_when_its_vmm_reads_no_more() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = migrating(&directory).await;
        let mut vmm = UnixStream::connect(&path).await.expect("a connection");
        vmm.write_all(&hello()).await.expect("a reader");
        let mut got = vec![0; 4096];
        vmm.read_exact(&mut got[..80]).await.expect("its hello");
        for _ in 0..3 {
            let (theft, ()) = tokio::join!(goes_on(&path), async {
                // What others do is no more to this one than packets that it passes over.
                while let Ok(Ok(count)) =
                    tokio::time::timeout(Duration::from_millis(300), vmm.read(&mut got)).await
                {
                    assert!(count > 0, "closed");
                }
            });
            assert_eq!(theft, None, "the session was taken over");
        }
        let answer = goes_on(&path).await.expect("an answer");
        assert_eq!(answer, [8, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 0, 0]);
        assert!(vmm.read_to_end(&mut got).await.is_ok(), "closed");
    }

    #[test]
    fn a_client_is_asked_once_however_many_want_its_device() {
        let mut question = Question::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            let mut put = 0;
            for _ in 0..16 {
                question.wanted = true;
                put += u32::from(question.is_put(now));
            }
            assert_eq!(put, 1);
            // The last of them is not forgotten.
            now = question.due().unwrap();
        }
        assert!(question.is_put(now) && question.due().is_none());
    }
}
