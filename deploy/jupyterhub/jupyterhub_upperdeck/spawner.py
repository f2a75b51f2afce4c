"""What a spawner of JupyterHub gets: saved images to start from, and a save before a server stops."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jupyterhub
from tornado import web
from traitlets import Bool, Enum, Float, TraitError, Unicode, default, validate
from traitlets.config import LoggingConfigurable

from .images import KEY_PREFIX, SavedImage, find, saved_images, with_packages
from .keys import AUDIENCE, ISSUER, Signer
from .manager import Json, Manager, Problem
from .owner import VARIABLE, owner_of
from .stopping import Outcome, not_saved, save_before_stop
from .text import markup
from .words import Words, english, words_of

FIELD = "upperdeck_save_on_stop"
"""Field of the form, and key of ``user_options``: whether the user wants a save before the server stops."""
IMAGE_OPTION = "image"
_MANAGERS: dict[tuple[str, str], Manager] = {}


def shared_manager(url: str, key: str) -> Manager:
    """Returns the process's one client of a manager, with the key from this file.

    Fails with :class:`jupyterhub_upperdeck.keys.KeyProblem`.
    """
    found = _MANAGERS.get((url, key))
    if found is None:
        found = _MANAGERS[url, key] = Manager(url, Signer.read(Path(key), ISSUER, AUDIENCE))
    return found


def groups_of(spawner: Any) -> list[str]:
    """Returns the names of the user's groups in the hub."""
    return [group.name for group in spawner.user.groups]


if TYPE_CHECKING:
    from jupyterhub.spawner import Spawner as _Base
else:
    # Not Spawner itself, whose subclasses have to be complete.
    _Base = LoggingConfigurable


class UpperdeckMixin(_Base):
    """For any spawner class: ``class MySpawner(UpperdeckMixin, SomeSpawner)``.

    It saves before a stop, states the session's owner in its environment, lets its token save it, and refuses saved
    images that the user may not start.
    """

    upperdeck_manager_url = Unicode(
        help="URL of upperdeck's manager, as the hub reaches it; UPPERDECK_MANAGER_URL by default."
    ).tag(config=True)
    upperdeck_signing_key = Unicode(help="File with the private key; UPPERDECK_SIGNING_KEY_FILE by default.").tag(
        config=True
    )
    upperdeck_target = Unicode(
        help="The manager's --target, e.g. harbor.example.org/sessions/{user}/{name}:{tag}. "
        "Images below it are started only by users who may."
    ).tag(config=True)
    upperdeck_service = Unicode("upperdeck", help="Name of the hub's service.").tag(config=True)
    upperdeck_service_url = Unicode(
        help="URL of the hub's service as servers reach it, e.g. http://hub:10101/services/upperdeck/."
    ).tag(config=True)
    save_on_stop = Enum(
        ["user", "always", "never"],
        default_value="user",
        help="Whether a server is saved before it stops: as its user chose on the spawn page, always or never.",
    ).tag(config=True)
    save_on_stop_default = Bool(False, help="What is chosen on the spawn page for a user who has not chosen yet.").tag(
        config=True
    )
    save_on_stop_bound = Float(
        300.0, min=1.0, help="Seconds that a stop waits for its save at most; then the server stops unsaved."
    ).tag(config=True)

    _saves_on_stop: bool | None = None
    _last_stop: Outcome | None = None
    _image_name: str | None = None
    upperdeck_chosen_image: SavedImage | None = None
    """The saved image that the server is started from, once it was checked."""

    @default("upperdeck_manager_url")
    def _default_manager_url(self) -> str:
        return os.environ.get("UPPERDECK_MANAGER_URL", "")

    @default("upperdeck_signing_key")
    def _default_signing_key(self) -> str:
        return os.environ.get("UPPERDECK_SIGNING_KEY_FILE", "")

    @default("server_token_scopes")
    def _default_server_token_scopes(self) -> list[str]:
        # Those of the role "server", and the service, which lets such a token save its own session and nothing else.
        return [
            "users:activity!user",
            "access:servers!server",
            f"access:services!service={self.upperdeck_service}",
        ]

    @property
    def upperdeck_manager(self) -> Manager:
        """The manager. Fails with :class:`Problem` if it is not set up, or the key cannot be used."""
        if not self.upperdeck_manager_url or not self.upperdeck_signing_key:
            raise Problem.unavailable("upperdeck_manager_url and upperdeck_signing_key are not both set")
        try:
            return shared_manager(self.upperdeck_manager_url, self.upperdeck_signing_key)
        except Exception as error:
            raise Problem.unavailable(str(error)) from error

    @property
    def upperdeck_owner(self) -> str:
        """The manager's name of the user."""
        return owner_of(self.user.name)

    def upperdeck_session(self) -> str | Json | None:
        """Returns what the manager knows this server's session by, `None` if nothing runs.

        Either a container's full ID, or ``{"namespace", "pod", "container"}``. KubeSpawner and DockerSpawner have it;
        other spawners override this.
        """
        pod = getattr(self, "pod_name", None)
        if pod:
            return {"namespace": self.namespace, "pod": pod, "container": "notebook"}
        found = getattr(self, "object_id", None)
        return str(found) if found else None

    # --- environment and state

    def get_env(self) -> dict[str, str]:
        env: dict[str, str] = super().get_env()
        # Last, so that no profile and no option of the user's changes whose session this is.
        env[VARIABLE] = self.upperdeck_owner
        if self.upperdeck_service_url:
            env["UPPERDECK_SERVICE_URL"] = self.upperdeck_service_url
        return env

    def get_state(self) -> Json:
        state: Json = super().get_state()
        kept: Json = {"saves_on_stop": self._saves_on_stop, "image_name": self._image_name}
        if self._last_stop:
            kept["last_stop"] = self._last_stop.as_json()
        session = self.upperdeck_session()
        if session is not None:
            kept["session"] = session
        state["upperdeck"] = kept
        return state

    def load_state(self, state: Json) -> None:
        super().load_state(state)
        kept = state.get("upperdeck")
        if isinstance(kept, dict):
            self._last_stop = Outcome.read(kept.get("last_stop"))
            chosen = kept.get("saves_on_stop")
            self._saves_on_stop = chosen if isinstance(chosen, bool) else None
            name = kept.get("image_name")
            self._image_name = name if isinstance(name, str) else None

    # --- saving on stop

    @property
    def upperdeck_saves(self) -> bool:
        """Whether this server is saved before it stops."""
        if self.save_on_stop != "user":
            return bool(self.save_on_stop == "always")
        chosen = (self.user_options or {}).get(FIELD)
        if isinstance(chosen, bool):
            return chosen
        return self.save_on_stop_default if self._saves_on_stop is None else self._saves_on_stop

    async def stop(self, now: bool = False) -> Any:
        # The page speaks of this stop, not of one before it.
        self._last_stop = None
        if not now and self.upperdeck_saves:
            await self.upperdeck_save()
        return await super().stop(now=now)

    async def upperdeck_save(self) -> Outcome | None:
        """Saves the running server within the bound. Never fails; the spawn page and the log say what came of it."""
        session = self.upperdeck_session()
        if session is None:
            return None
        self._last_stop = Outcome.now(False, ("interrupted", {}))
        try:
            self._last_stop = await save_before_stop(
                self.upperdeck_manager,
                self.upperdeck_owner,
                session,
                bound=self.save_on_stop_bound,
                name=self._image_name,
            )
        except Problem as problem:
            self._last_stop = Outcome.now(False, not_saved(str(problem)))
        except Exception as error:
            # A stop has to end in a stop, whatever a reply of the manager looks like.
            self.log.exception("Saving %s before its stop failed", self._log_name)
            self._last_stop = Outcome.now(False, not_saved(type(error).__name__))
        self.log.info("Stop of %s: %s", self._log_name, self._last_stop.text())
        return self._last_stop

    # --- the images that may be started

    @property
    def upperdeck_prefix(self) -> str:
        """The beginning of the references of all saved images."""
        return str(self.upperdeck_target).partition("{user}")[0]

    @validate("upperdeck_target")
    def _validate_target(self, proposal: Any) -> str:
        # Without this, the images of others would be images like any other.
        target = str(proposal["value"])
        if target and (not target.partition("{user}")[0] or "{user}" not in target):
            raise TraitError(f"upperdeck_target is the manager's --target, HOST/…{{user}}…, and not {target!r}")
        return target

    async def upperdeck_images(self, most: int = 30) -> list[SavedImage]:
        """Returns the images that the user may start, with their packages. Fails with :class:`Problem`."""
        manager = self.upperdeck_manager
        found = await saved_images(manager, self.upperdeck_owner, groups=groups_of(self), most=most)
        return await with_packages(manager, found)

    def upperdeck_is_saved(self, named: Any) -> bool:
        """Returns whether a request names a saved image: by its key, or by a reference below the target."""
        if not isinstance(named, str):
            raise web.HTTPError(400, words_of(self)("image_not_offered"))
        prefix = self.upperdeck_prefix
        return named.startswith(KEY_PREFIX) or bool(prefix and _below(named, prefix))

    async def upperdeck_resolve(self, named: str) -> SavedImage:
        """Returns the saved image that a request names by its key or a reference, if the user may start it now.

        Refuses the request otherwise.
        """
        with self._checking():
            image = await find(self.upperdeck_manager, self.upperdeck_owner, named, groups=groups_of(self))
        if image is None:
            # The same for an image that does not exist and for one of another user.
            raise web.HTTPError(403, words_of(self)("image_unknown"))
        self.upperdeck_chosen_image = image
        self._image_name = image.name
        return image

    async def upperdeck_check(self, reference: str) -> SavedImage | None:
        """Refuses a saved image that the user may not start now, whatever it was named by.

        Returns it, or `None` for an image that is no saved one: those are for the spawner's own settings to permit.
        """
        if not self.upperdeck_is_saved(reference):
            return None
        image = await self.upperdeck_resolve(reference)
        if image.reference != reference:
            # What a tag names may be another image by the time that it is pulled.
            raise web.HTTPError(403, words_of(self)("image_refused"))
        return image

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """Refuses the request if the manager does not say which images the user may start."""
        try:
            yield
        except Problem as problem:
            raise web.HTTPError(503, words_of(self)("image_unchecked", reason=problem)) from problem

    def upperdeck_continued(self, images: Iterable[SavedImage]) -> str | None:
        """Returns the key of the image that the last stop saved, from which the user most likely goes on."""
        last = self._last_stop.image if self._last_stop else None
        found = (
            image.key for image in images if not image.shared and last in [f"{image.name}:{tag}" for tag in image.tags]
        )
        return next(found, None)

    # --- the spawn page

    async def get_options_form(self) -> str:
        form = await super().get_options_form()
        if not form:
            return ""
        return self._notes() + str(form) + self._choice()

    def _notes(self) -> str:
        if self._last_stop is None:
            return ""
        kind = "success" if self._last_stop.saved else "warning"
        words = words_of(self)
        said = words("last_stop", at=self._last_stop.at, text=self._last_stop.text(words))
        return f'<div class="alert alert-{kind}" id="upperdeck-last-stop">{markup(said, 500)}</div>'

    def _choice(self) -> str:
        if self.save_on_stop != "user":
            return ""
        checked = " checked" if self.upperdeck_saves else ""
        return (
            '<div class="form-group form-check mt-3">'
            f'<input type="hidden" name="{FIELD}" value="no">'
            f'<input class="form-check-input" type="checkbox" id="{FIELD}" name="{FIELD}" value="yes"{checked}> '
            f'<label class="form-check-label" for="{FIELD}">{markup(words_of(self)("save_on_stop"))}</label></div>'
        )

    def upperdeck_chosen(self, form: dict[str, list[Any]]) -> Json:
        """Returns the part of ``user_options`` that the choice on the spawn page makes, and takes it from the form."""
        given = form.pop(FIELD, None)
        return {} if given is None else {FIELD: "yes" in given}

    def upperdeck_started(self) -> None:
        """Remembers the user's choice for this server, which a restart of the hub and the next start keep.

        What is saved of a server that was started from a saved image has its name, as a later version.
        """
        self._image_name = None
        self.upperdeck_chosen_image = None
        chosen = (self.user_options or {}).get(FIELD)
        if isinstance(chosen, bool):
            self._saves_on_stop = chosen


def _below(reference: str, prefix: str) -> bool:
    """Returns whether a reference is below a prefix, also in another notation of the same."""
    return _plain(reference).startswith(_plain(prefix))


def _plain(reference: str) -> str:
    plain = reference.strip().lower()
    for scheme in ("docker://", "https://", "http://"):
        plain = plain.removeprefix(scheme)
    host, slash, rest = plain.partition("/")
    return host.removesuffix(":443").removesuffix(":80") + slash + rest


class ImageForm(UpperdeckMixin):
    """For spawners that start the image in their trait ``image``: a form with the site's images and the saved ones.

    The form and a request name a saved image by a key, which is looked up among the user's images when the server
    starts. A spawner calls :meth:`upperdeck_image` in its ``start`` for the image to start.
    """

    upperdeck_images_shown = 30

    @default("options_form")
    def _default_options_form(self) -> Any:
        return type(self).upperdeck_options_form

    @default("options_from_form")
    def _default_options_from_form(self) -> Any:
        return self.upperdeck_options_from_form

    def upperdeck_site_images(self) -> dict[str, str]:
        """Returns the site's images that a user may choose, by name; empty: the spawner's own image alone."""
        return {}

    async def upperdeck_options_form(self) -> str:
        """Returns the form of the spawn page."""
        words = words_of(self)
        problem = ""
        images: list[SavedImage] = []
        try:
            images = await self.upperdeck_images(self.upperdeck_images_shown)
        except Problem as error:
            self.log.warning("Saved images of %s cannot be listed: %s", self.user.name, error)
            problem = (
                '<div class="alert alert-warning" id="upperdeck-problem">'
                f"{markup(words('image_unlisted', reason=error), 400)}</div>"
            )
        chosen = self.upperdeck_continued(images) or str((self.user_options or {}).get(IMAGE_OPTION, ""))
        site = list(self.upperdeck_site_images()) or [""]
        if chosen not in [*site, *(image.key for image in images)]:
            chosen = site[0]
        rows = [_row(name, name or words("hub_image"), [], name == chosen) for name in site]
        for heading, theirs in (("mine", False), ("shared", True)):
            part = [image for image in images if image.shared is theirs]
            if part:
                rows.append(f'<h4 class="mt-3">{markup(words(heading))}</h4>')
                rows += [_saved_row(image, image.key == chosen, words) for image in part]
        return f'{problem}<div class="form-group" id="upperdeck-images">{"".join(rows)}</div>'

    def upperdeck_options_from_form(self, form: dict[str, list[Any]]) -> Json:
        """Returns ``user_options`` from the form."""
        options = self.upperdeck_chosen(form)
        chosen = form.get(IMAGE_OPTION)
        if chosen and chosen[0]:
            options[IMAGE_OPTION] = str(chosen[0])
        return options

    async def upperdeck_image(self) -> str:
        """Returns the reference of the image to start, after the user's choice was checked.

        Fails with an HTTP error if the user may not start it.
        """
        self.upperdeck_started()
        chosen = (self.user_options or {}).get(IMAGE_OPTION)
        if not chosen:
            return str(self.image)
        if self.upperdeck_is_saved(chosen):
            return (await self.upperdeck_resolve(chosen)).reference
        site = self.upperdeck_site_images()
        if chosen not in site:
            raise web.HTTPError(400, words_of(self)("image_not_offered"))
        return site[chosen]


def _row(key: str, title: str, details: Iterable[str], checked: bool) -> str:
    said = "".join(f'<div class="text-muted small">{markup(text, 300)}</div>' for text in details if text)
    return (
        f'<div class="form-check"><label class="form-check-label"><input class="form-check-input" type="radio" '
        f'name="{IMAGE_OPTION}" value="{markup(key)}"{" checked" if checked else ""}> '
        f"<strong>{markup(title)}</strong>{said}</label></div>"
    )


def _saved_row(image: SavedImage, checked: bool, words: Words) -> str:
    details = [image.message, " · ".join(image.details(words)), *warnings(image, words)]
    return _row(image.key, image.title, details, checked)


def warnings(image: SavedImage, words: Words = english) -> list[str]:
    """Returns why an image may not start here, as sentences; empty if nothing is against it."""
    judged = image.judged(jupyterhub.__version__)
    if judged.starts or not judged.against:
        return []
    reasons = " ".join(reason.sentence(words) for reason in judged.against)
    return [words("starts_not" if judged.starts is False else "starts_perhaps", reasons=reasons)]
