//! One slot: the card in it as the guest sees it, and the command at work.

use std::time::{Duration, Instant};

use vscard_protocol::{Atr, Command, Response, Secret, StatusWord, Validity, apdu};

use crate::device::{Actions, CardFailure, Outcome, SlotId, Token};
use crate::message::{
    AnswerType, ErrorCode, Header, IccStatus, MessageType, Parameters, Status, answer, failure,
};
use crate::pipe::Queue;

/// Between time extensions. libccid gives up after three seconds.
const EXTENSION: Duration = Duration::from_secs(1);
/// For the answer to IccPowerOn. There are no time extensions: libccid, which takes one for an answer without
/// ATR here, waits for 60 seconds.
const POWER_ON_LIMIT: Duration = Duration::from_secs(30);

/// What a slot works with, which is not its own.
pub(crate) struct Context<'a> {
    pub(crate) queue: &'a mut Queue,
    pub(crate) actions: &'a mut Actions,
    /// dwMaxCCIDMessageLength less the header.
    pub(crate) max_data: usize,
    pub(crate) now: Instant,
}

#[derive(Debug)]
pub(crate) struct Slot {
    /// Its number on the device.
    pub(crate) id: SlotId,
    /// bSlot: its number on its interface.
    pub(crate) number: u8,
    pub(crate) card: Card,
    /// The guest was not told yet that a card came or went.
    pub(crate) changed: bool,
    pub(crate) parameters: Parameters,
    pub(crate) running: Option<Running>,
    /// The parts of a command so far (wLevelParameter 1 and 3, USB CCID 1.1 §6.1.4).
    pub(crate) gathered: Option<Secret>,
    /// A response that is read in parts, and how many bytes of it were (bChainParameter, USB CCID 1.1
    /// §6.2.1).
    pub(crate) unread: Option<(Response, usize)>,
    pub(crate) abort: Option<AbortHalf>,
    /// Names the power-on that follows [`restore`](crate::Device::restore), of which the guest knows
    /// nothing.
    pub(crate) resuming: Option<Token>,
}

/// The card in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Card {
    Absent,
    Inactive,
    Active(Atr),
}

/// The command at work.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) token: Token,
    pub(crate) seq: u8,
    pub(crate) work: Work,
    /// When to ask for more time, or to give up.
    pub(crate) due: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    PowerOn,
    Transmit,
}

/// The half of an ABORT that came first, with its bSeq (USB CCID 1.1 §5.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AbortHalf {
    Control(u8),
    Bulk(u8),
}

impl Slot {
    pub(crate) fn new(id: SlotId, number: u8) -> Self {
        Self {
            id,
            number,
            card: Card::Absent,
            changed: false,
            parameters: Parameters::DEFAULT,
            running: None,
            gathered: None,
            unread: None,
            abort: None,
            resuming: None,
        }
    }

    // ---- the guest's side -------------------------------------------------------------------------------

    /// A whole message for this slot.
    pub(crate) fn message(&mut self, header: Header, data: &[u8], context: &mut Context<'_>) {
        let seq = header.seq;
        if header.kind == MessageType::ABORT && data.is_empty() {
            return self.abort_message(seq, context);
        }
        if self.abort.is_some() {
            return self.fail(header, ErrorCode::ABORTED, context);
        }
        if self.running.is_some() && !begins_anew(header.kind) {
            return self.fail(header, ErrorCode::SLOT_BUSY, context);
        }
        let [parameter, level_low, level_high] = header.specific;
        let result = match header.kind {
            MessageType::ICC_POWER_ON => no_data(data).and_then(|()| self.power_on(seq, parameter, context)),
            MessageType::ICC_POWER_OFF => no_data(data).map(|()| self.power_off(seq, context)),
            MessageType::GET_SLOT_STATUS => no_data(data).map(|()| self.status(seq, context)),
            MessageType::XFR_BLOCK => {
                self.exchange(seq, u16::from_le_bytes([level_low, level_high]), data, context)
            }
            MessageType::GET_PARAMETERS => {
                no_data(data).and_then(|()| self.powered()).map(|_| self.tell_parameters(seq, context))
            }
            MessageType::RESET_PARAMETERS => no_data(data).and_then(|()| {
                self.parameters = Parameters::of_atr(self.powered()?);
                self.tell_parameters(seq, context);
                Ok(())
            }),
            MessageType::SET_PARAMETERS => self.set_parameters(seq, parameter, data, context),
            MessageType::ABORT => Err(ErrorCode::LENGTH),
            // IccClock, T0APDU, Secure, Mechanical, Escape and SetDataRateAndClockFrequency: the clock is not
            // stopped, APDUs are not changed on their way, there is no PIN pad, no mechanism, no rate to set
            // and nothing a vendor added. Types that are not known end here, too.
            _ => Err(ErrorCode::NOT_SUPPORTED),
        };
        if let Err(error) = result {
            self.fail(header, error, context);
        }
    }

    /// Answers that a message failed.
    pub(crate) fn fail(&self, header: Header, error: ErrorCode, context: &mut Context<'_>) {
        let message = failure(header.kind, [self.number, header.seq], self.icc(), error, &self.parameters);
        context.queue.push(self.number, message, Validity::default());
    }

    /// ABORT on the control pipe (USB CCID 1.1 §5.3.1).
    pub(crate) fn abort_control(&mut self, seq: u8, context: &mut Context<'_>) {
        match self.abort {
            Some(AbortHalf::Bulk(waiting)) if waiting == seq => return self.aborted(seq, context),
            Some(AbortHalf::Bulk(waiting)) => self.abort_failed(waiting, context),
            Some(AbortHalf::Control(_)) | None => {}
        }
        self.abort = Some(AbortHalf::Control(seq));
    }

    /// PC_to_RDR_Abort (USB CCID 1.1 §6.1.13).
    fn abort_message(&mut self, seq: u8, context: &mut Context<'_>) {
        match self.abort {
            Some(AbortHalf::Control(waiting)) if waiting == seq => return self.aborted(seq, context),
            // The host waits for its other half.
            Some(AbortHalf::Control(_)) => return self.abort_failed(seq, context),
            Some(AbortHalf::Bulk(waiting)) => self.abort_failed(waiting, context),
            None => {}
        }
        self.abort = Some(AbortHalf::Bulk(seq));
    }

    fn abort_failed(&self, seq: u8, context: &mut Context<'_>) {
        self.answer(AnswerType::SlotStatus, seq, Status::Failed(ErrorCode::ABORTED), 0, &[], context);
    }

    /// Both halves are there.
    fn aborted(&mut self, seq: u8, context: &mut Context<'_>) {
        self.abort = None;
        match self.running.take().map(|running| running.work) {
            Some(Work::PowerOn) => context.actions.power_off(self.id),
            Some(Work::Transmit) => context.actions.forget_transmit(self.id),
            None => {}
        }
        self.gathered = None;
        self.unread = None;
        // libccid takes any answer for that to an XfrBlock, so there must be no stale one.
        context.queue.drop_answers(self.number);
        self.answer(AnswerType::SlotStatus, seq, Status::Done, 0, &[], context);
    }

    /// IccPowerOn (USB CCID 1.1 §6.1.1). A card that is powered is reset.
    fn power_on(&mut self, seq: u8, select: u8, context: &mut Context<'_>) -> Result<(), ErrorCode> {
        if select > 3 {
            return Err(ErrorCode::SEVENTH);
        }
        if self.card == Card::Absent {
            return Err(ErrorCode::ICC_MUTE);
        }
        if self.running.is_some() {
            // Whoever waited for its answer is gone. libccid skips an answer to another message, but reads the one after
            // it only as far as that was long.
            context.queue.drop_answers(self.number);
        }
        self.unpower(context.actions);
        self.begin_power_on(seq, context);
        Ok(())
    }

    fn begin_power_on(&mut self, seq: u8, context: &mut Context<'_>) {
        let token = context.actions.power_on(self.id);
        self.running = Some(Running { token, seq, work: Work::PowerOn, due: context.now + POWER_ON_LIMIT });
    }

    /// IccPowerOff (USB CCID 1.1 §6.1.2).
    fn power_off(&mut self, seq: u8, context: &mut Context<'_>) {
        self.unpower(context.actions);
        self.status(seq, context);
    }

    /// GetSlotStatus (USB CCID 1.1 §6.1.3).
    fn status(&self, seq: u8, context: &mut Context<'_>) {
        self.answer(AnswerType::SlotStatus, seq, Status::Done, 0, &[], context);
    }

    fn tell_parameters(&self, seq: u8, context: &mut Context<'_>) {
        let Parameters { protocol, .. } = self.parameters;
        self.answer(
            AnswerType::Parameters,
            seq,
            Status::Done,
            protocol,
            self.parameters.structure(),
            context,
        );
    }

    /// SetParameters (USB CCID 1.1 §6.1.7).
    fn set_parameters(
        &mut self,
        seq: u8,
        protocol: u8,
        structure: &[u8],
        context: &mut Context<'_>,
    ) -> Result<(), ErrorCode> {
        let parameters = Parameters::parse(protocol, structure)?;
        if !self.powered()?.protocols().any(|offered| offered == protocol) {
            return Err(ErrorCode::SEVENTH);
        }
        self.parameters = parameters;
        self.tell_parameters(seq, context);
        Ok(())
    }

    /// XfrBlock at the extended APDU level (USB CCID 1.1 §6.1.4).
    fn exchange(
        &mut self,
        seq: u8,
        level: u16,
        data: &[u8],
        context: &mut Context<'_>,
    ) -> Result<(), ErrorCode> {
        self.powered()?;
        if !matches!(level, 0..=3 | 0x10) {
            return Err(ErrorCode::LEVEL);
        }
        let gathered = self.gathered.take();
        if level == 0x10 {
            if self.unread.is_none() {
                return Err(ErrorCode::LEVEL);
            }
            no_data(data)?;
            self.next_part(seq, context);
            return Ok(());
        }
        self.unread = None;
        match (level, gathered) {
            (0, _) if data.is_empty() => Err(ErrorCode::LENGTH),
            (0, _) => {
                self.transmit(seq, data, context);
                Ok(())
            }
            (1, _) => self.gather(seq, Secret::default(), data, context),
            (3, Some(gathered)) => self.gather(seq, gathered, data, context),
            (2, Some(mut gathered)) => {
                if gathered.len() + data.len() > apdu::MAX_COMMAND {
                    return Err(ErrorCode::LENGTH);
                }
                gathered.extend(data);
                self.transmit(seq, gathered.expose(), context);
                Ok(())
            }
            _ => Err(ErrorCode::LEVEL),
        }
    }

    /// Keeps a part of a command and asks for the next.
    fn gather(
        &mut self,
        seq: u8,
        mut gathered: Secret,
        part: &[u8],
        context: &mut Context<'_>,
    ) -> Result<(), ErrorCode> {
        if gathered.len() + part.len() > apdu::MAX_COMMAND {
            return Err(ErrorCode::LENGTH);
        }
        gathered.extend(part);
        self.gathered = Some(gathered);
        self.answer(AnswerType::DataBlock, seq, Status::Done, 0x10, &[], context);
        Ok(())
    }

    /// Gives a whole command to the card; what is no command is answered here.
    fn transmit(&mut self, seq: u8, bytes: &[u8], context: &mut Context<'_>) {
        match Command::parse(bytes) {
            Ok(command) => {
                let token = context.actions.transmit(self.id, command);
                let due = context.now + EXTENSION;
                self.running = Some(Running { token, seq, work: Work::Transmit, due });
            }
            Err(_) => self.respond(seq, StatusWord::WRONG_LENGTH.into(), context),
        }
    }

    fn respond(&mut self, seq: u8, response: Response, context: &mut Context<'_>) {
        self.unread = Some((response, 0));
        self.next_part(seq, context);
    }

    /// The next part of a response, or all of it (bChainParameter, USB CCID 1.1 §6.2.1).
    fn next_part(&mut self, seq: u8, context: &mut Context<'_>) {
        let Some((mut response, start)) = self.unread.take() else { return };
        if response.validity().has_ended() {
            response = refused(start);
        }
        let bytes = response.as_bytes();
        let end = bytes.len().min(start + context.max_data);
        let chain = match (start == 0, end == bytes.len()) {
            (true, true) => 0,
            (true, false) => 1,
            (false, true) => 2,
            (false, false) => 3,
        };
        let part = bytes.get(start..end).unwrap_or_default();
        let ids = [self.number, seq];
        let message = answer(AnswerType::DataBlock, ids, self.icc(), Status::Done, chain, part);
        context.queue.push(self.number, message, response.validity().clone());
        if end < bytes.len() {
            self.unread = Some((response, end));
        }
    }

    // ---- the card's side --------------------------------------------------------------------------------

    /// A card is in; if there was one, it is another.
    pub(crate) fn insert(&mut self, context: &mut Context<'_>) {
        self.remove(context);
        self.card = Card::Inactive;
        self.changed = true;
    }

    pub(crate) fn remove(&mut self, context: &mut Context<'_>) {
        if self.card == Card::Absent {
            return;
        }
        context.actions.forget(self.id);
        self.card = Card::Absent;
        self.changed = true;
        self.forget_session();
        if let Some(running) = self.running.take() {
            self.fail_running(&running, ErrorCode::ICC_MUTE, context);
        }
    }

    /// What the card came to. A token that names nothing is ignored.
    pub(crate) fn complete(&mut self, token: Token, outcome: Outcome, context: &mut Context<'_>) {
        if self.resuming == Some(token) {
            return self.resumed(outcome, context);
        }
        let Some(running) = self.running.take_if(|running| running.token == token) else { return };
        context.queue.drop_extensions(self.number);
        match (running.work, outcome) {
            (Work::PowerOn, Outcome::Powered(atr)) => {
                self.parameters = Parameters::of_atr(&atr);
                let data = atr.as_bytes().to_vec();
                self.card = Card::Active(atr);
                self.answer(AnswerType::DataBlock, running.seq, Status::Done, 0, &data, context);
            }
            (Work::Transmit, Outcome::Response(response)) => self.respond(running.seq, response, context),
            (_, Outcome::Failed(failure)) => {
                if failure == CardFailure::Removed {
                    self.forget_session();
                    self.card = Card::Inactive;
                }
                let error = match failure {
                    CardFailure::Removed | CardFailure::Mute => ErrorCode::ICC_MUTE,
                    CardFailure::Busy => ErrorCode::BUSY_WITH_AUTO_SEQUENCE,
                    CardFailure::Hardware => ErrorCode::HARDWARE,
                };
                self.fail_running(&running, error, context);
            }
            (_, Outcome::Powered(_) | Outcome::Response(_)) => {
                self.fail_running(&running, ErrorCode::HARDWARE, context);
            }
        }
    }

    /// Goes on after the device was restored: `work` is what was at work, with its bSeq.
    pub(crate) fn resume(&mut self, work: Option<(Work, u8)>, context: &mut Context<'_>) {
        match work {
            Some((Work::PowerOn, seq)) => self.begin_power_on(seq, context),
            Some((Work::Transmit, seq)) => {
                let status = Status::Failed(ErrorCode::HARDWARE);
                self.answer(AnswerType::DataBlock, seq, status, 0, &[], context);
            }
            None => {}
        }
        if matches!(self.card, Card::Active(_)) {
            self.resuming = Some(context.actions.power_on(self.id));
        }
    }

    /// The card was powered again after the device was restored.
    fn resumed(&mut self, outcome: Outcome, context: &mut Context<'_>) {
        self.resuming = None;
        match outcome {
            Outcome::Powered(atr) if self.card == Card::Active(atr.clone()) => {}
            Outcome::Powered(_) => {
                self.insert(context);
                context.actions.power_off(self.id);
            }
            Outcome::Response(_) | Outcome::Failed(_) => self.insert(context),
        }
    }

    // ---- time, reset ------------------------------------------------------------------------------------

    pub(crate) fn handle_deadline(&mut self, context: &mut Context<'_>) {
        let now = context.now;
        let Some(running) = self.running.as_mut().filter(|running| running.due <= now) else { return };
        match running.work {
            Work::Transmit => {
                running.due = now + EXTENSION;
                let seq = running.seq;
                // A guest that does not read is asked once.
                if !context.queue.has_extension(self.number) {
                    self.answer(AnswerType::DataBlock, seq, Status::TimeExtension, 0, &[], context);
                }
            }
            Work::PowerOn => {
                if let Some(running) = self.running.take() {
                    context.actions.power_off(self.id);
                    self.fail_running(&running, ErrorCode::ICC_MUTE, context);
                }
            }
        }
    }

    /// Back to the state after configuration: unpowered, and a card that is in is told anew.
    pub(crate) fn reset(&mut self, actions: &mut Actions) {
        self.unpower(actions);
        self.abort = None;
        self.changed = self.card != Card::Absent;
    }

    // ---- small ------------------------------------------------------------------------------------------

    pub(crate) fn waits_for(&self, token: Token) -> bool {
        self.resuming == Some(token) || self.running.as_ref().is_some_and(|running| running.token == token)
    }

    /// Answers the guest will get from here without sending anything else on the bulk pipe.
    pub(crate) fn owed(&self) -> usize {
        let aborting = matches!(self.abort, Some(AbortHalf::Bulk(_)));
        usize::from(self.running.is_some()) + usize::from(aborting)
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.running.as_ref().map(|running| running.due)
    }

    pub(crate) fn is_present(&self) -> bool {
        self.card != Card::Absent
    }

    /// bmICCStatus.
    fn icc(&self) -> IccStatus {
        match self.card {
            Card::Absent => IccStatus::Absent,
            Card::Inactive => IccStatus::Inactive,
            Card::Active(_) => IccStatus::Active,
        }
    }

    fn powered(&self) -> Result<&Atr, ErrorCode> {
        match &self.card {
            Card::Active(atr) => Ok(atr),
            Card::Absent | Card::Inactive => Err(ErrorCode::ICC_MUTE),
        }
    }

    /// Ends the card's session, if it has one or is about to.
    fn unpower(&mut self, actions: &mut Actions) {
        let powering = self.running.take().is_some_and(|running| running.work == Work::PowerOn);
        if powering || matches!(self.card, Card::Active(_)) {
            actions.power_off(self.id);
        }
        if self.is_present() {
            self.card = Card::Inactive;
        }
        self.forget_session();
    }

    /// All that the end of a card's session makes void but the command at work.
    fn forget_session(&mut self) {
        self.parameters = Parameters::DEFAULT;
        self.gathered = None;
        self.unread = None;
        self.resuming = None;
    }

    fn fail_running(&self, running: &Running, error: ErrorCode, context: &mut Context<'_>) {
        context.queue.drop_extensions(self.number);
        self.answer(AnswerType::DataBlock, running.seq, Status::Failed(error), 0, &[], context);
    }

    fn answer(
        &self,
        kind: AnswerType,
        seq: u8,
        status: Status,
        last: u8,
        data: &[u8],
        context: &mut Context<'_>,
    ) {
        let message = answer(kind, [self.number, seq], self.icc(), status, last, data);
        context.queue.push(self.number, message, Validity::default());
    }
}

/// In place of a response that may not be read on any more, of which so many bytes were read.
pub(crate) fn refused(read: usize) -> Response {
    Response::new(&vec![0; read], StatusWord::SECURITY_STATUS_NOT_SATISFIED)
}

/// The two messages that a busy slot takes. CMD_SLOT_BUSY is there for both (USB CCID 1.1 §6.2.6), but neither needs
/// it: what the status is, is known, and a card can be reset at any time. A driver that waits for its answer sends
/// neither; one that was killed meanwhile and started again begins with them, and libccid gives up for good a reader
/// that refuses the first and a card whose reader refuses the second.
fn begins_anew(kind: MessageType) -> bool {
    matches!(kind, MessageType::GET_SLOT_STATUS | MessageType::ICC_POWER_ON)
}

fn no_data(data: &[u8]) -> Result<(), ErrorCode> {
    if data.is_empty() { Ok(()) } else { Err(ErrorCode::LENGTH) }
}
