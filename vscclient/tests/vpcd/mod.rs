//! A vpcd that asks what pcscd makes it ask.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};

const ON: u8 = 0x01;
pub(crate) const ATR: u8 = 0x04;

pub(crate) fn ask(card: &mut TcpStream, question: u8) {
    card.write_all(&[0, 1, question]).unwrap();
}

pub(crate) fn answer(card: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    card.read_exact(&mut length).unwrap();
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    card.read_exact(&mut answer).unwrap();
    answer
}

pub(crate) fn vpcd() -> (TcpListener, u16) {
    let vpcd = TcpListener::bind("127.0.0.1:0").unwrap();
    set_socket_timeout(&vpcd, Timeout::Recv, Some(Duration::from_secs(60))).unwrap();
    let port = vpcd.local_addr().unwrap().port();
    (vpcd, port)
}

/// Finds the card and powers it.
pub(crate) fn power(card: &mut TcpStream) {
    for questions in [&[ATR][..], &[ATR], &[ON, ATR]] {
        questions.iter().for_each(|question| ask(card, *question));
        assert_eq!(answer(card)[0], 0x3B);
    }
}
